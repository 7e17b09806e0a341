"""The iteration of D-NPEFF: HALS for the coefficients and the components, with extrapolation of the components.

    state = initial_diagonal_state(components, options)
    while not diagonal_stopping_reason(state, options):
        statistics = sum over shards of shard.accumulate(state.components_KP)      # the only pass over the data
        state, record = advance_diagonal(state, statistics, options, candidates if a component is dead)
        shard.settle(record.accepted) for every shard

A pass improves W at the trial components Ĥ and computes WᵀX and WᵀW. From these sums, sweeps without access to the data
improve the components H, and the loss of (W, H) is computed exactly. The next trial extrapolates the last change of H,

    Ĥ ← max(0, H + β (H − H_before)).

The extrapolation parameter β is adapted as in the extrapolated HALS of Ang & Gillis (Neural Computation 31, 2019,
algorithm 3). While the loss decreases, β grows. If the loss increases, the step is rejected, W and H are reset to the
best ones, β shrinks, and the next trial is not extrapolated. Unlike in the paper, W is not extrapolated: it gave no
improvement in experiments, and the state of an example then consists only of its coefficients. The use of several
sweeps per pass follows Gillis & Glineur (Neural Computation 24, 2012).

Shapes: N examples, P entries or groups, K components, S columns of a slab.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npeff.factorization.diagonals.shard import SLAB_COLUMNS, DiagonalShard, DiagonalStatistics
from npeff.factorization.matching import canonical_order, near_duplicates
from npeff.factorization.nnls import hals_
from npeff.factorization.objective import Candidates, explained, merge_candidates
from npeff.factorization.problem import InvalidProblemError, validate_size
from npeff.factorization.solver import Factorization, IterationRecord
from npeff.options.solver import SolverOptions

_SWEEPS = 4
"""Sweeps of the components per pass. Their cost is K/N of that of the products of the pass."""

_FIRST_EXTRAPOLATION = 0.9
_EXTRAPOLATION_GROWTH, _LIMIT_GROWTH, _EXTRAPOLATION_SHRINKING = 1.1, 1.05, 1.5
"""γ, γ̄ and η of Ang & Gillis."""

_PATIENCE = 3
"""Number of steps in a row that must change the loss by less than the tolerance."""

_UNEXPLAINED_FLOOR = 1e-6
"""Lower bound of the loss, as a fraction of ‖X‖², in the relative change of the convergence test."""


@dataclass(frozen=True)
class DiagonalState:
    """State of the solver, without the examples and their coefficients. Tensors have the precision of the data."""

    components_KP: Tensor
    """The next trial Ĥ (K, P), with rows of any length."""
    best_components_KP: Tensor
    """H (K, P) of the best accepted step."""
    best_loss: float
    weight: float
    """Extrapolation parameter β."""
    weight_limit: float
    """Upper bound of β."""
    plain: bool
    """Whether the trial is not extrapolated, so that it is the best H."""
    iteration: int
    """Number of completed passes."""
    n_accepted: int
    n_small_steps: int
    """Number of last steps in a row that changed the loss by less than the tolerance."""

    def to(self, device: torch.device) -> DiagonalState:
        """Return the state with its tensors on a device."""
        return dataclasses.replace(
            self,
            components_KP=self.components_KP.to(device),
            best_components_KP=self.best_components_KP.to(device),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return named arrays, with scalars as 0-d arrays. `from_arrays` restores the state exactly."""
        tensors = {"components": self.components_KP, "best_components": self.best_components_KP}
        return {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()} | {
            name: np.asarray(getattr(self, name), dtype=kind) for name, kind in _SCALAR_FIELDS.items()
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> DiagonalState:
        """Invert `to_arrays`."""
        return cls(
            components_KP=torch.from_numpy(arrays["components"].copy()),
            best_components_KP=torch.from_numpy(arrays["best_components"].copy()),
            **{name: arrays[name].item() for name in _SCALAR_FIELDS},
        )


_SCALAR_FIELDS: dict[str, type[np.generic]] = {
    "best_loss": np.float64,
    "weight": np.float64,
    "weight_limit": np.float64,
    "plain": np.bool_,
    "iteration": np.int64,
    "n_accepted": np.int64,
    "n_small_steps": np.int64,
}


def initial_diagonal_state(components_KP: Tensor, options: SolverOptions) -> DiagonalState:
    """Return the state before the first pass, whose trial is the given components.

    Raises:
        InvalidProblemError: if there are not n_components rows, or they are not finite and non-negative.
    """
    if components_KP.ndim != 2 or len(components_KP) != options.n_components:
        raise InvalidProblemError(
            f"starting components of shape {tuple(components_KP.shape)} do not fit n_components={options.n_components}"
        )
    if not bool((torch.isfinite(components_KP) & (components_KP >= 0)).all()):
        raise InvalidProblemError("every starting component must be finite and non-negative")
    return DiagonalState(
        components_KP=components_KP,
        best_components_KP=components_KP,
        best_loss=math.inf,
        weight=_FIRST_EXTRAPOLATION,
        weight_limit=1.0,
        plain=True,
        iteration=0,
        n_accepted=0,
        n_small_steps=0,
    )


def advance_diagonal(
    state: DiagonalState, statistics: DiagonalStatistics, options: SolverOptions, candidates: Candidates | None = None
) -> tuple[DiagonalState, IterationRecord]:
    """Improve the components, accept or reject them, and compute the next trial.

    Args:
        state: state with the trial `components_KP`, at which the coefficients were improved.
        statistics: statistics of all examples with these coefficients.
        options: options of the solver.
        candidates: replacements from all examples at the trial. They replace dead components in the next trial, which
            is accepted only if its loss is not larger, like every trial.

    Returns:
        The next state and the record of the step.

    Raises:
        InvalidProblemError: if every diagonal is zero, or the first loss is not finite.
    """
    total = statistics.fisher_square_sum
    if not total > 0.0:
        raise InvalidProblemError("every diagonal Fisher is zero: there is nothing to factorize")
    dead_K = statistics.dead_K(state.components_KP)
    improved_KP, loss = _improved(state.components_KP, statistics)
    if state.n_accepted == 0 and not math.isfinite(loss):
        raise InvalidProblemError(f"the Fishers are out of range, as the loss at the start is {loss}: rescale them")
    accepted = loss <= state.best_loss
    record = IterationRecord(
        iteration=state.iteration + 1,
        loss=loss,
        objective=loss,
        explained=explained(loss, total),
        mu=0.0 if state.plain else state.weight,
        accepted=accepted,
        n_dead=int(dead_K.sum()),
    )
    judged = dataclasses.replace(
        state, iteration=state.iteration + 1, n_small_steps=_small_steps(state, loss, total, options.tolerance)
    )
    if not accepted:
        return dataclasses.replace(
            judged,
            components_KP=state.best_components_KP,
            weight=state.weight if state.plain else state.weight / _EXTRAPOLATION_SHRINKING,
            weight_limit=state.weight_limit if state.plain else state.weight,
            plain=True,
        ), record
    trial_KP = improved_KP
    if state.n_accepted > 0:
        trial_KP = torch.lerp(state.best_components_KP, improved_KP, 1.0 + state.weight).clamp_(min=0.0)
    if candidates is not None:
        trial_KP = _reseeded(trial_KP, dead_K, candidates)
    return dataclasses.replace(
        judged,
        components_KP=trial_KP,
        best_components_KP=improved_KP,
        best_loss=loss,
        weight=min(state.weight_limit, _EXTRAPOLATION_GROWTH * state.weight),
        weight_limit=min(1.0, _LIMIT_GROWTH * state.weight_limit),
        plain=state.n_accepted == 0,
        n_accepted=state.n_accepted + 1,
    ), record


def diagonal_stopping_reason(state: DiagonalState, options: SolverOptions) -> str | None:
    """Return the reason to stop, or None to continue.

    The result depends only on the arguments, so a run continues if `max_iterations` is increased.
    """
    if state.n_small_steps >= _PATIENCE:
        return "converged"
    if state.iteration >= options.max_iterations:
        return "max_iterations"
    return None


def solve_diagonal(shards: Sequence[DiagonalShard], start_KP: Tensor, options: SolverOptions) -> Factorization:
    """Factorize the examples of all shards in this process, starting from the given components.

    Args:
        shards: the examples, in the order of the coefficients of the result. The first pass starts from the
            coefficients of the shards.
        start_KP: starting components, from `initialize_diagonal` or another factorization, in the precision of the
            data.
        options: options of the solver.

    Raises:
        InvalidProblemError: if there are no examples, more components than examples, or only zero diagonals.
    """
    validate_size(sum(shard.n_examples for shard in shards), 1, options.n_components)
    state = initial_diagonal_state(start_KP, options)
    history: list[IterationRecord] = []
    while (stopped := diagonal_stopping_reason(state, options)) is None:
        state, record = step_diagonal(shards, state, options)
        history.append(record)
    components_KP, statistics = finish_diagonal(shards, state)
    order_K, _ = canonical_order(components_KP, statistics.ww_KK.diagonal())
    loss = statistics.loss(components_KP)
    return Factorization(
        components_KD=components_KP[order_K],
        coefficients_NK=torch.cat([shard.coefficients_NK for shard in shards])[:, order_K],
        loss=loss,
        objective=loss,
        explained=explained(loss, statistics.fisher_square_sum),
        history=history,
        n_iter=state.iteration,
        stopped=stopped,
        near_duplicates=near_duplicates(components_KP[order_K]),
    )


def step_diagonal(
    shards: Sequence[DiagonalShard], state: DiagonalState, options: SolverOptions
) -> tuple[DiagonalState, IterationRecord]:
    """Run one pass and one step in this process."""
    statistics = DiagonalStatistics.zeros(*state.components_KP.shape, device=state.components_KP.device)
    for shard in shards:
        statistics.merge(shard.accumulate(state.components_KP))
    candidates = None
    if bool(statistics.dead_K(state.components_KP).any()):
        candidates = merge_candidates([shard.candidates(state.components_KP) for shard in shards])
    state, record = advance_diagonal(state, statistics, options, candidates)
    for shard in shards:
        shard.settle(record.accepted)
    return state, record


def unit_components(state: DiagonalState) -> tuple[Tensor, Tensor]:
    """Return the best components as unit rows (K, P), float64, and their lengths (K,). A zero component stays zero."""
    h_KP = state.best_components_KP.double()
    norms_K = torch.linalg.norm(h_KP, dim=1)
    return h_KP / torch.where(norms_K > 0, norms_K, 1.0)[:, None], norms_K


def finish_diagonal(shards: Sequence[DiagonalShard], state: DiagonalState) -> tuple[Tensor, DiagonalStatistics]:
    """Return the best components as unit rows, and set the coefficients of all shards to their optimum."""
    components_KP, norms_K = unit_components(state)
    statistics = DiagonalStatistics.zeros(*components_KP.shape, device=components_KP.device)
    for shard in shards:
        shard.rescale(norms_K)
        statistics.merge(shard.finish(components_KP))
    return components_KP, statistics


def _improved(components_KP: Tensor, statistics: DiagonalStatistics) -> tuple[Tensor, float]:
    """Return the components after some sweeps of HALS at fixed coefficients, and their loss, accumulated in float64.

    The columns are independent. They are computed in slabs that fit in the cache.
    """
    improved_KP = torch.empty_like(components_KP)
    ww_low_KK = statistics.ww_KK.to(components_KP)
    gram_KK = torch.zeros_like(statistics.ww_KK)
    fitted = 0.0
    for start in range(0, components_KP.shape[1], SLAB_COLUMNS):
        slab = slice(start, start + SLAB_COLUMNS)
        h_KS = components_KP[:, slab].clone(memory_format=torch.contiguous_format)
        wx_KS = statistics.wx_KP[:, slab]
        improved_KP[:, slab] = hals_(h_KS, wx_KS.to(h_KS), ww_low_KK, _SWEEPS)
        h_KS = h_KS.double()
        gram_KK.addmm_(h_KS, h_KS.T)
        fitted += 2.0 * float(torch.sum(wx_KS * h_KS))
    fitted -= float(torch.sum(statistics.ww_KK * gram_KK))
    return improved_KP, statistics.fisher_square_sum - fitted


def _small_steps(state: DiagonalState, loss: float, total: float, tolerance: float) -> int:
    """Return the number of last steps in a row, including this one, that indicate convergence.

    A step without extrapolation increases the loss only by rounding. If such a step is rejected, the solver has
    converged, independent of the tolerance.
    """
    scale = max(abs(loss), _UNEXPLAINED_FLOOR * total)
    rejected = not loss <= state.best_loss
    if abs(state.best_loss - loss) <= tolerance * scale or (rejected and state.plain):
        return state.n_small_steps + 1
    return state.n_small_steps if rejected else 0


def _reseeded(components_KP: Tensor, dead_K: Tensor, candidates: Candidates) -> Tensor:
    """Return the components with the candidates in the rows of dead components, worst-fitted example first."""
    offered_MP = candidates.directions_MD[candidates.residuals_M > 0]
    rows = dead_K.nonzero()[: len(offered_MP), 0]
    components_KP = components_KP.clone()
    components_KP[rows] = offered_MP[: len(rows)].to(components_KP)
    return components_KP
