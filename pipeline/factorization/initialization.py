"""Where the solver starts: Jennrich's algorithm on a subsample, from several seeds, the best kept.

In the exact model F̂_i = Hᵀ diag(W_i) H, two non-negative mixtures of the Fishers, M_a = Σ_i a_i F̂_i and M_b, are both
diagonalised by the components: the generalised eigenvectors M_a x = λ M_b x give them as h ∝ M_b x (Leurgans, Ross &
Abel 1993, the algorithm attributed to Jennrich), provided the ratios λ differ. Noise makes that a rough answer, so
starts are polished by some iterations of the solver and judged by their losses; the worse half of them are given up
early (successive halving: Jamieson & Talwalkar, AISTATS 2016).

All starts share one compression: the leading right singular vectors V (D, Q) of the stacked factor rows. Components
within the span of V have the same loss, up to a constant, on the compressed factors ÂV, where D is replaced by Q.

Shapes: M subsampled examples, R rank, D sketch, K components, Q compressed dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from pipeline.factorization.example_shard import ExampleShard
from pipeline.factorization.matching import match_components
from pipeline.factorization.problem import InvalidProblemError, validate_size
from pipeline.factorization.solver import SolverOptions, SolverState, advance, free_dead, initial_state, stopping_reason

_EXTRA_DIMENSIONS = 32
_POWER_ITERATIONS = 2
_POLISHING_ITERATIONS = (4, 8, 16)
"""In all, at the ends of rounds; after each but the last the better half of the starts go on. On planted problems and
a real model's Fishers the best of four after 4 was the best after 20, or within 0.7% of its loss (once 1.1%)."""
_RANK_TOLERANCE = 1e-6
"""Singular values below this fraction of the largest carry no direction worth starting from."""


def subsample_indices(n_examples: int, size: int, seed: int) -> np.ndarray:
    """Indices of min(size, n_examples) distinct examples, ascending, int64; the same for the same arguments."""
    if size >= n_examples:
        return np.arange(n_examples, dtype=np.int64)
    chosen = np.random.default_rng([seed, n_examples]).choice(n_examples, size=size, replace=False)
    return np.sort(chosen).astype(np.int64)


def initialize(
    factors_MRD: Tensor | np.ndarray,
    n_components: int,
    seed: int,
    n_starts: int = 4,
    *,
    weights_M: Tensor | np.ndarray | None = None,
    frozen_KD: Tensor | None = None,
    l1: float = 0.0,
    orthogonality: float = 0.0,
) -> Tensor:
    """Starting components (K, D), unit rows, float64; the same for the same arguments.

    More components than the data has dimensions are filled up with directions of badly fitted examples. The first rows
    are the frozen components where some are given, and the others those of a start that are least like them.

    Args:
        factors_MRD: of the subsample.
        n_components: K, the frozen ones included.
        seed: of the starts.
        n_starts: how many are tried; the best is kept.
        weights_M: of the examples.
        frozen_KD: unit rows that are to stay.
        l1: as in `SolverOptions`, as is `orthogonality`: starts are judged with them.

    Raises:
        InvalidProblemError: if the factors are not finite, all zero, or fewer rows than components.
    """
    shard = ExampleShard(factors_MRD, weights_N=weights_M)
    validate_size(shard.n_examples, shard.rank, n_components)
    if not bool((shard.weights_N * shard.fisher_squares_N).any()):
        raise InvalidProblemError("every factor is zero: there is nothing to factorize")
    generator = torch.Generator().manual_seed(seed)
    rows = shard.factors_NRD.reshape(-1, shard.dim)
    if weights_M is not None:
        rows = rows * shard.weights_N.sqrt().repeat_interleave(shard.rank)[:, None].to(rows)
    basis_DQ, singular_values_Q = _leading_directions(rows, n_components + _EXTRA_DIMENSIONS, generator)
    frozen_KD = basis_DQ.new_zeros(0, shard.dim) if frozen_KD is None else frozen_KD.to(basis_DQ)
    basis_DQ = _with_directions(basis_DQ, frozen_KD)
    compressed_MRQ = shard.factors_NRD @ basis_DQ.to(shard.factors_NRD)
    n_leading = min(n_components, int((singular_values_Q > _RANK_TOLERANCE * singular_values_Q[0]).sum()))
    options = SolverOptions(
        n_components=n_components, l1=l1, orthogonality=orthogonality, n_frozen=len(frozen_KD), n_starts=n_starts
    )
    compressed = ExampleShard(compressed_MRQ, weights_N=shard.weights_N)
    starts = [_start(compressed, frozen_KD @ basis_DQ, n_leading, options, generator) for _ in range(n_starts)]
    best = _best_polished(compressed, starts, options)
    components_KD = best.best_components_KD @ basis_DQ.T
    components_KD[: len(frozen_KD)] = frozen_KD
    return components_KD / torch.linalg.norm(components_KD, dim=1, keepdim=True)


def _with_directions(basis_DQ: Tensor, directions_KD: Tensor) -> Tensor:
    """The orthonormal basis, enlarged by what of the directions lies outside of its span."""
    outside_KD = directions_KD - (directions_KD @ basis_DQ) @ basis_DQ.T
    _, s, v = torch.linalg.svd(outside_KD, full_matrices=False)
    return torch.cat([basis_DQ, v[s > _RANK_TOLERANCE].T], dim=1)


def _leading_directions(rows: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal (D, Q) and singular values (Q,), descending, by randomised subspace iteration.

    Source: Halko, Martinsson & Tropp, SIAM Review 53 (2011), algorithm 4.4; Q = min(n, number of rows, D).
    """
    n = min(n, *rows.shape)
    probe = torch.randn(rows.shape[1], n, dtype=torch.float64, generator=generator).to(rows)
    for _ in range(_POWER_ITERATIONS):
        probe = torch.linalg.qr(rows.T @ (rows @ probe)).Q
    _, singular_values, v_QD = torch.linalg.svd(
        (torch.linalg.qr(rows @ probe).Q.T @ rows).double(), full_matrices=False
    )
    return v_QD.T, singular_values


def _start(
    shard: ExampleShard, frozen_KQ: Tensor, n_leading: int, options: SolverOptions, generator: torch.Generator
) -> SolverState:
    """One seeded start on the compressed factors."""
    n_components = options.n_components
    components_KQ = shard.factors_NRD.new_zeros(n_components, shard.dim, dtype=torch.float64)
    leading_MRK = shard.factors_NRD[:, :, :n_leading].double()
    components_KQ[:n_leading, :n_leading] = _jennrich(leading_MRK, shard.weights_N, generator)
    if n_leading < n_components:
        shard.coefficients_NK = shard.factors_NRD.new_zeros(shard.n_examples, 0)
        shard.accumulate(components_KQ)
        components_KQ[n_leading:] = _badly_fitted_rows(shard, n_components - n_leading, generator).double()
    return initial_state(_beside(frozen_KQ, components_KQ), options)


def _best_polished(shard: ExampleShard, starts: Sequence[SolverState], options: SolverOptions) -> SolverState:
    """The start with the lowest objective after the last round of polishing."""
    # a start goes on with the coefficients that it had
    going_on = [(state, shard.factors_NRD.new_zeros(shard.n_examples, 0)) for state in starts]
    for stop_at in _POLISHING_ITERATIONS:
        until = dataclasses.replace(options, max_iterations=stop_at)
        polished = []
        for state, shard.coefficients_NK in going_on:
            polished.append((_polished(shard, state, until), shard.coefficients_NK))
        going_on = sorted(polished, key=lambda pair: pair[0].best_objective)[: math.ceil(len(polished) / 2)]
    return going_on[0][0]


def _polished(shard: ExampleShard, state: SolverState, options: SolverOptions) -> SolverState:
    while stopping_reason(state, options) is None:
        statistics = shard.accumulate(state.components_KD, l1=options.l1)
        candidates = shard.candidates(state.components_KD) if bool(free_dead(statistics, options).any()) else None
        state, _ = advance(state, statistics, options, candidates)
    return state


def _beside(frozen_KQ: Tensor, components_KQ: Tensor) -> Tensor:
    """The frozen components, then those of the others that no frozen one is matched with."""
    if not len(frozen_KQ):
        return components_KQ
    pairs, _ = match_components(frozen_KQ.cpu().numpy(), components_KQ.cpu().numpy())
    free = torch.ones(len(components_KQ), dtype=torch.bool)
    free[pairs[:, 1]] = False
    return torch.cat([frozen_KQ, components_KQ[free.to(components_KQ.device)]])


def _jennrich(compressed_MRK: Tensor, example_weights_M: Tensor, generator: torch.Generator) -> Tensor:
    """Components (K, K) in compressed coordinates from two random mixtures of the examples."""
    dim = compressed_MRK.shape[2]
    rows = compressed_MRK.reshape(-1, dim)
    mixtures = []
    for _ in range(2):
        # Weighting examples by how they respond to a random direction spreads the ratios λ further than weights drawn
        # without regard to the examples, whose mixtures both come close to the mean Fisher.
        probe_K = torch.randn(dim, dtype=torch.float64, generator=generator).to(rows)
        weights_M = example_weights_M * (compressed_MRK @ probe_K).square().sum(dim=1)
        mixtures.append((compressed_MRK * weights_M[:, None, None]).reshape(-1, dim).T @ rows)
    m_a, m_b = (m / m.trace().clamp(min=torch.finfo(m.dtype).tiny) for m in mixtures)
    m_b = m_b + 1e-9 * torch.eye(dim).to(m_b)
    _, x = scipy.linalg.eigh(m_a.cpu().numpy(), m_b.cpu().numpy())
    components_KK = (m_b @ torch.from_numpy(x).to(m_b)).T
    return components_KK / torch.linalg.norm(components_KK, dim=1, keepdim=True)


def _badly_fitted_rows(shard: ExampleShard, n: int, generator: torch.Generator) -> Tensor:
    """Unit factor rows drawn by their size times the misfit of their example; random directions if they run out."""
    rows = shard.factors_NRD.reshape(-1, shard.dim)
    squares = rows.square().sum(dim=1)
    weights = squares * (shard.weights_N * shard.misfits_N).clamp(min=0.0).repeat_interleave(shard.rank)
    drawn = torch.randn(n, shard.dim, dtype=torch.float64, generator=generator).to(rows)
    n_usable = min(n, int((weights > 0).sum()))
    if n_usable > 0:
        drawn[:n_usable] = rows[torch.multinomial(weights.cpu(), n_usable, generator=generator).to(rows.device)]
    return drawn / torch.linalg.norm(drawn, dim=1, keepdim=True)
