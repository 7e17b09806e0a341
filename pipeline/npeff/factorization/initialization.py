"""Starting components of the solver: the best of several seeded starts by Jennrich's algorithm on a subsample.

In the exact model F̂_i = Hᵀ diag(W_i) H, the components diagonalize two non-negative mixtures of the Fishers,
M_a = Σ_i a_i F̂_i and M_b. If the ratios λ are distinct, the generalized eigenvectors M_a x = λ M_b x give the
components as h ∝ M_b x (Leurgans, Ross & Abel 1993, the algorithm attributed to Jennrich). With noise, the result is
approximate. The starts are therefore refined by some iterations of the solver and compared by their losses. The worse
half of the starts is dropped early (successive halving: Jamieson & Talwalkar, AISTATS 2016).

The best set of components depends on all examples, not only on the subsample. The subsample gives `n_candidates`
components, a quarter more than requested. One additional pass over all examples, at half the cost of a pass of the
solver, selects the `most_useful` ones.

All starts use the same compression: the leading right singular vectors V (D, Q) of the stacked factor rows. Components
in the span of V have the same loss, up to a constant, on the compressed factors ÂV, where D is replaced by Q.

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
"""Iterations of each round on half of the subsample. After each round, the better half of the starts continues. On
planted problems and on the Fishers of a real model, the best of four starts after 3 iterations was the best after 20,
or within 0.7% of the best loss (in one case 1.1%)."""
_SCOUTING_ROWS = 8
"""Minimum number of factor rows per component in the subsample for the use of half of the subsample."""
_POLISHING_ITERATIONS = 6
_RIDGE = 1e-9
_RANK_TOLERANCE = 1e-6
"""Singular values below this fraction of the largest are treated as zero."""


def subsample_indices(n_examples: int, size: int, seed: int) -> np.ndarray:
    """Return min(size, n_examples) distinct indices of examples, ascending, int64. The result is deterministic."""
    if size >= n_examples:
        return np.arange(n_examples, dtype=np.int64)
    chosen = np.random.default_rng([seed, n_examples]).choice(n_examples, size=size, replace=False)
    return np.sort(chosen).astype(np.int64)


def n_candidates(n_components: int, shape: Sequence[int]) -> int:
    """Return the number of candidates for `n_components` and a subsample with factors of shape (M, R, D)."""
    n_examples, rank, dim = shape
    return max(n_components, min(n_components + math.ceil(n_components / 4), n_examples * rank, dim))


def most_useful(candidates_CD: Tensor, ww_CC: Tensor, n_components: int, n_frozen: int = 0) -> Tensor:
    """Select K candidates by backward elimination: repeatedly remove the candidate whose removal least increases the
    loss.

    If component j is removed and the other coefficients are refitted, the loss increases by (WᵀW)_jj / (G⁻¹)_jj, with
    G = (H Hᵀ)∘(H Hᵀ), as long as no coefficient becomes negative. The refit subtracts w_j (G⁻¹)_j / (G⁻¹)_jj from the
    other coefficients (Hassibi & Stork, NeurIPS 1992, for the weights of networks).

    Args:
        candidates_CD: unit rows.
        ww_CC: WᵀW over all examples.
        n_components: K.
        n_frozen: number of frozen components, which are the first rows and are always selected.

    Returns:
        Mask (C,) of the selected candidates.
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
        inverse_CC[j, j] = 1.0  # avoids a division by zero
    return kept_C.to(candidates_CD.device)


def candidate_components(
    factors_MRD: Tensor, options: SolverOptions, weights_M: Tensor | None = None, frozen_KD: Tensor | None = None
) -> Tensor:
    """Return `n_candidates` candidates (C, D) for the components, by `initialize`.

    Raises:
        InvalidProblemError: as for `initialize`, and if there are fewer rows than components.
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
    """Return starting components (K, D) for a shard in memory: the most useful candidates of `initialize`.

    Raises:
        InvalidProblemError: as for `initialize`, and if every example has weight zero.
    """
    weighted = shard.weights_N.nonzero()[:, 0]
    if not len(weighted):
        raise InvalidProblemError("every example has weight zero: give a positive weight to at least one example")
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
    """Compute starting components. The result is deterministic.

    If K is larger than the dimension of the data, the remaining components are directions of badly fitted examples. If
    there are frozen components, they are the first rows. The other rows are the components of a start that are least
    similar to the frozen components.

    Args:
        factors_MRD: factors of the subsample.
        n_components: K, including the frozen components.
        seed: seed of the starts.
        n_starts: number of starts, of which the best is used.
        weights_M: weights of the examples.
        frozen_KD: frozen components, unit rows.
        l1: as in `SolverOptions`. The starts are compared with this penalty.
        orthogonality: as in `SolverOptions`. The starts are compared with this penalty.

    Returns:
        Unit rows (K, D), float64.

    Raises:
        InvalidProblemError: if the factors are not finite or all zero, or there are fewer factor rows than components.
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
    """Extend the orthonormal basis to a basis of its span and the directions."""
    outside_KD = directions_KD - (directions_KD @ basis_DQ) @ basis_DQ.T
    _, s, v = torch.linalg.svd(outside_KD, full_matrices=False)
    return torch.cat([basis_DQ, v[s > _RANK_TOLERANCE].T], dim=1)


def _leading_directions(rows: Tensor, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return orthonormal directions (D, Q) and descending singular values (Q,), by randomized subspace iteration.

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
    """Return the state of one seeded start on the compressed factors."""
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
    """Return the best start after successive halving and the last iterations, which use the whole subsample."""
    # each start continues with its own coefficients
    remaining = [(state, scouted.factors_NRD.new_zeros(scouted.n_examples, 0)) for state in starts]
    for further in _SCOUTING_ITERATIONS:
        further_options = [dataclasses.replace(options, max_iterations=s.iteration + further) for s, _ in remaining]
        polished = []
        for (state, scouted.coefficients_NK), until in zip(remaining, further_options, strict=True):
            polished.append((_polished(scouted, state, until), scouted.coefficients_NK))
        remaining = sorted(polished, key=lambda pair: pair[0].best_objective)[: math.ceil(len(polished) / 2)]
    last = dataclasses.replace(options, max_iterations=_POLISHING_ITERATIONS)
    finished = []
    for state, _ in remaining:
        compressed.coefficients_NK = compressed.factors_NRD.new_zeros(compressed.n_examples, 0)
        finished.append(_polished(compressed, initial_state(state.best_components_KD, options), last))
    return min(finished, key=lambda state: state.best_objective)


def _polished(shard: ExampleShard, state: SolverState, options: SolverOptions) -> SolverState:
    """Run passes over the subsample with half the sweeps of the solver, which suffices to compare starts."""
    while stopping_reason(state, options) is None:
        gram_KK = (state.components_KD @ state.components_KD.T).square()
        statistics = shard.accumulate(state.components_KD, sweeps=math.ceil(sweeps_for(gram_KK) / 2), l1=options.l1)
        candidates = shard.candidates(state.components_KD) if bool(free_dead(statistics, options).any()) else None
        state, _ = advance(state, statistics, options, candidates)
    return state


def _beside(frozen_KQ: Tensor, components_KQ: Tensor) -> Tensor:
    """Return the frozen components, followed by the other components that match no frozen component."""
    if not len(frozen_KQ):
        return components_KQ
    pairs, _ = match_components(frozen_KQ.cpu().numpy(), components_KQ.cpu().numpy())
    free = torch.ones(len(components_KQ), dtype=torch.bool)
    free[pairs[:, 1]] = False
    return torch.cat([frozen_KQ, components_KQ[free.to(components_KQ.device)]])


def _jennrich(compressed_MRK: Tensor, example_weights_M: Tensor, generator: torch.Generator) -> Tensor:
    """Return components (K, K) in compressed coordinates from two random mixtures of the examples."""
    dim = compressed_MRK.shape[2]
    rows = compressed_MRK.reshape(-1, dim)
    mixtures = []
    for _ in range(2):
        # Each weight is the response of the example to a random direction. The ratios λ are then more spread out than
        # with weights drawn independently of the examples, for which both mixtures are close to the mean Fisher.
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
    """Draw unit factor rows, with probability ∝ squared norm times misfit; random directions if there are too few."""
    rows = shard.factors_NRD.reshape(-1, shard.dim)
    squares = rows.square().sum(dim=1)
    weights = squares * (shard.weights_N * shard.misfits_N).clamp(min=0.0).repeat_interleave(shard.rank)
    drawn = torch.randn(n, shard.dim, dtype=torch.float64, generator=generator).to(rows)
    n_usable = min(n, int((weights > 0).sum()))
    if n_usable > 0:
        drawn[:n_usable] = rows[torch.multinomial(weights.cpu(), n_usable, generator=generator).to(rows.device)]
    result: Tensor = drawn / torch.linalg.norm(drawn, dim=1, keepdim=True)
    return result
