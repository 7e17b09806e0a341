"""Where the solver starts: Jennrich's algorithm on a subsample, from several seeds, the best kept.

In the exact model F̂_i = Hᵀ diag(W_i) H, two non-negative mixtures of the Fishers, M_a = Σ_i a_i F̂_i and M_b, are both
diagonalised by the components: the generalised eigenvectors M_a x = λ M_b x give them as h ∝ M_b x (Leurgans, Ross &
Abel 1993, the algorithm attributed to Jennrich), provided the ratios λ differ. Noise makes that a rough answer, so
starts are polished by some iterations of the solver and judged by their losses; the worse half of them are given up
early (successive halving: Jamieson & Talwalkar, AISTATS 2016).

Which components are worth having depends on examples that the subsample does not have: `n_candidates`, a quarter more
than are asked for, are tried, and all examples say in a pass of their own, of half the cost, which are `most_useful`.

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

from npeff.factorization.example_shard import ExampleShard
from npeff.factorization.matching import match_components
from npeff.factorization.nnls import sweeps_for
from npeff.factorization.problem import InvalidProblemError, validate_size
from npeff.factorization.solver import SolverState, advance, free_dead, initial_state, stopping_reason
from npeff.options.solver import SolverOptions

_EXTRA_DIMENSIONS = 32
_POWER_ITERATIONS = 2
_SCOUTING_ITERATIONS = (3, 3)
"""On half of the subsample; after each so many the better half of the starts go on. On planted problems and on a real
model's Fishers the best of four after 3 was the best after 20, or within 0.7% of its loss (once 1.1%)."""
_SCOUTING_ROWS = 8
"""Factor rows per component that the subsample must have for half of it to be enough."""
_POLISHING_ITERATIONS = 6
_RIDGE = 1e-9
_RANK_TOLERANCE = 1e-6
"""Singular values below this fraction of the largest carry no direction worth starting from."""


def subsample_indices(n_examples: int, size: int, seed: int) -> np.ndarray:
    """Indices of min(size, n_examples) distinct examples, ascending, int64; the same for the same arguments."""
    if size >= n_examples:
        return np.arange(n_examples, dtype=np.int64)
    chosen = np.random.default_rng([seed, n_examples]).choice(n_examples, size=size, replace=False)
    return np.sort(chosen).astype(np.int64)


def n_candidates(n_components: int, shape: Sequence[int]) -> int:
    """How many components to try where so many are asked for and the subsample's factors have shape (M, R, D)."""
    n_examples, rank, dim = shape
    return max(n_components, min(n_components + math.ceil(n_components / 4), n_examples * rank, dim))


def most_useful(candidates_CD: Tensor, ww_CC: Tensor, n_components: int, n_frozen: int = 0) -> Tensor:
    """Mask (C,) of the K candidates that are left when one after the other is taken away for which the loss rises
    least; the first ones, which are frozen, stay.

    Without component j, and with the other coefficients refitted, the loss rises by (WᵀW)_jj / (G⁻¹)_jj, with
    G = (H Hᵀ)∘(H Hᵀ), as long as none of them turns negative; refitting takes w_j (G⁻¹)_j / (G⁻¹)_jj from them
    (Hassibi & Stork, NeurIPS 1992, for the weights of networks).

    Args:
        candidates_CD: unit rows.
        ww_CC: WᵀW over all examples.
        n_components: K.
        n_frozen: how many of the first rows are to stay.
    """
    gram_CC = (candidates_CD @ candidates_CD.T).square().cpu()
    gram_CC.diagonal().add_(_RIDGE)
    inverse_CC, ww_CC = torch.linalg.inv(gram_CC), ww_CC.cpu().clone()
    kept_C = torch.ones(len(gram_CC), dtype=torch.bool)
    for _ in range(len(gram_CC) - n_components):
        rises_C = ww_CC.diagonal() / inverse_CC.diagonal()
        rises_C[:n_frozen] = rises_C[~kept_C] = math.inf
        j = int(rises_C.argmin())
        kept_C[j] = False
        refit_C = inverse_CC[j] / inverse_CC[j, j]
        moved_C = ww_CC[j] - ww_CC[j, j] / 2 * refit_C
        ww_CC -= torch.outer(moved_C, refit_C) + torch.outer(refit_C, moved_C)
        inverse_CC -= torch.outer(inverse_CC[:, j], refit_C)
        inverse_CC[j, j] = 1.0  # not to divide by zero
    return kept_C.to(candidates_CD.device)


def candidate_components(
    factors_MRD: Tensor, options: SolverOptions, weights_M: Tensor | None = None, frozen_KD: Tensor | None = None
) -> Tensor:
    """Candidates (C, D) for the components that are asked for, `n_candidates` of them, by `initialize`.

    Raises:
        InvalidProblemError: as `initialize` does, and if fewer rows than components were given.
    """
    validate_size(factors_MRD.shape[0], factors_MRD.shape[1], options.n_components)
    return initialize(
        factors_MRD,
        n_candidates(options.n_components, factors_MRD.shape),
        options.seed,
        options.n_starts,
        weights_M=weights_M,
        frozen_KD=frozen_KD,
        l1=options.l1,
        orthogonality=options.orthogonality,
    )


def starting_components(shard: ExampleShard, options: SolverOptions, frozen_KD: Tensor | None = None) -> Tensor:
    """Starting components (K, D) for all examples of a shard in memory: those of `initialize` that are most useful.

    Raises:
        InvalidProblemError: as `initialize` does, or every example has weight zero.
    """
    weighted = shard.weights_N.nonzero()[:, 0]
    if not len(weighted):
        raise InvalidProblemError("every example has weight zero: there is nothing to factorize")
    chosen = weighted[
        torch.from_numpy(subsample_indices(len(weighted), options.subsample, options.seed)).to(weighted.device)
    ]
    candidates_CD = candidate_components(shard.factors_NRD[chosen], options, shard.weights_N[chosen], frozen_KD)
    ww_CC = shard.coefficient_products(candidates_CD, l1=options.l1)
    return candidates_CD[most_useful(candidates_CD, ww_CC, options.n_components, options.n_frozen)]


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
    scouted, live = compressed, (compressed.weights_N * compressed.fisher_squares_N).nonzero()[:, 0]
    if len(live) * shard.rank >= _SCOUTING_ROWS * n_components:
        scouted = ExampleShard(compressed_MRQ[live[::2]], weights_N=shard.weights_N[live[::2]])
    starts = [_start(scouted, frozen_KD @ basis_DQ, n_leading, options, generator) for _ in range(n_starts)]
    best = _best_polished(scouted, compressed, starts, options)
    components_KD = best.best_components_KD @ basis_DQ.T
    components_KD[: len(frozen_KD)] = frozen_KD
    result: Tensor = components_KD / torch.linalg.norm(components_KD, dim=1, keepdim=True)
    return result


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


def _best_polished(
    scouted: ExampleShard, compressed: ExampleShard, starts: Sequence[SolverState], options: SolverOptions
) -> SolverState:
    """The best of the starts that were not given up, after the last iterations, on the whole subsample."""
    # a start goes on with the coefficients that it had
    going_on = [(state, scouted.factors_NRD.new_zeros(scouted.n_examples, 0)) for state in starts]
    for further in _SCOUTING_ITERATIONS:
        further_options = [dataclasses.replace(options, max_iterations=s.iteration + further) for s, _ in going_on]
        polished = []
        for (state, scouted.coefficients_NK), until in zip(going_on, further_options, strict=True):
            polished.append((_polished(scouted, state, until), scouted.coefficients_NK))
        going_on = sorted(polished, key=lambda pair: pair[0].best_objective)[: math.ceil(len(polished) / 2)]
    last = dataclasses.replace(options, max_iterations=_POLISHING_ITERATIONS)
    finished = []
    for state, _ in going_on:
        compressed.coefficients_NK = compressed.factors_NRD.new_zeros(compressed.n_examples, 0)
        finished.append(_polished(compressed, initial_state(state.best_components_KD, options), last))
    return min(finished, key=lambda state: state.best_objective)


def _polished(shard: ExampleShard, state: SolverState, options: SolverOptions) -> SolverState:
    """After further passes over the subsample, with half the sweeps of the solver: enough to compare starts."""
    while stopping_reason(state, options) is None:
        gram_KK = (state.components_KD @ state.components_KD.T).square()
        statistics = shard.accumulate(state.components_KD, sweeps=math.ceil(sweeps_for(gram_KK) / 2), l1=options.l1)
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
    result: Tensor = components_KK / torch.linalg.norm(components_KK, dim=1, keepdim=True)
    return result


def _badly_fitted_rows(shard: ExampleShard, n: int, generator: torch.Generator) -> Tensor:
    """Unit factor rows drawn by their size times the misfit of their example; random directions if they run out."""
    rows = shard.factors_NRD.reshape(-1, shard.dim)
    squares = rows.square().sum(dim=1)
    weights = squares * (shard.weights_N * shard.misfits_N).clamp(min=0.0).repeat_interleave(shard.rank)
    drawn = torch.randn(n, shard.dim, dtype=torch.float64, generator=generator).to(rows)
    n_usable = min(n, int((weights > 0).sum()))
    if n_usable > 0:
        drawn[:n_usable] = rows[torch.multinomial(weights.cpu(), n_usable, generator=generator).to(rows.device)]
    result: Tensor = drawn / torch.linalg.norm(drawn, dim=1, keepdim=True)
    return result
