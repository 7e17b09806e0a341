"""D-NPEFF's iteration: coefficients by HALS where the examples are, components by HALS from their sums, extrapolated.

    state = initial_diagonal_state(components, options)
    while not diagonal_stopping_reason(state, options):
        statistics = sum over shards of shard.accumulate(state.components_KP)      # the only pass over the data
        state, record = advance_diagonal(state, statistics, options, candidates if a component is dead)
        shard.settle(record.accepted) for every shard

A pass improves W at the trial components Ĥ and gives WᵀX and WᵀW; from these the components H improve by sweeps that do
not touch the data, and the loss of (W, H) is known exactly. The next trial is H moved on by β times its last change,

    Ĥ ← max(0, H + β (H − H_before)),

with β adapted as in the extrapolated HALS of Ang & Gillis (Neural Computation 31, 2019, algorithm 3): while the loss
falls β grows; where it rises the step is rejected, W and H go back to the best ones, β shrinks, and the next pass is
plain. W is not extrapolated, unlike theirs: no better in experiments, and the state of an example is then its
coefficients alone. Several sweeps a pass are due to Gillis & Glineur (Neural Computation 24, 2012).

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
"""Of the components, in a pass. They cost K/N of its products."""

_FIRST_WEIGHT = 0.9
_WEIGHT_GROWTH, _LIMIT_GROWTH, _WEIGHT_SHRINKING = 1.1, 1.05, 1.5
"""γ, γ̄ and η of Ang & Gillis."""

_PATIENCE = 3
"""Steps in a row that must each change the loss by less than the tolerance."""

_UNEXPLAINED_FLOOR = 1e-6
"""Losses below this fraction of ‖X‖² count as this much when changes are compared with the tolerance."""


@dataclass(frozen=True)
class DiagonalState:
    """All that the next step depends on, besides the examples and their coefficients. Tensors are of the precision of
    the data."""

    components_KP: Tensor
    """The trial Ĥ to be evaluated next; rows of any length."""
    best_components_KP: Tensor
    """H of the best accepted step."""
    best_loss: float
    weight: float
    """β."""
    weight_limit: float
    """What β grows up to."""
    plain: bool
    """Whether the trial is the best H itself, not extrapolated."""
    iteration: int
    """Passes made."""
    n_accepted: int
    n_small_steps: int
    """Latest steps in a row that changed the loss by less than the tolerance."""

    def to(self, device: torch.device) -> DiagonalState:
        """The same state with its tensors on a device."""
        return dataclasses.replace(
            self,
            components_KP=self.components_KP.to(device),
            best_components_KP=self.best_components_KP.to(device),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays, scalars as 0-d; `from_arrays` restores the state exactly."""
        tensors = {"components": self.components_KP, "best_components": self.best_components_KP}
        return {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()} | {
            name: np.asarray(getattr(self, name), dtype=kind) for name, kind in _SCALAR_FIELDS.items()
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> DiagonalState:
        """The inverse of `to_arrays`."""
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
    """The state before the first pass, which finds coefficients of these components, and better components.

    Raises:
        InvalidProblemError: if there are not n_components of them, or they are not finite and non-negative.
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
        weight=_FIRST_WEIGHT,
        weight_limit=1.0,
        plain=True,
        iteration=0,
        n_accepted=0,
        n_small_steps=0,
    )


def advance_diagonal(
    state: DiagonalState, statistics: DiagonalStatistics, options: SolverOptions, candidates: Candidates | None = None
) -> tuple[DiagonalState, IterationRecord]:
    """Improve the components, judge them, and propose the next trial.

    Args:
        state: at whose `components_KP` the coefficients were improved.
        statistics: of all examples with these coefficients.
        options: of the run.
        candidates: from all examples, at the same components. They take the place of dead components in the next
            trial, which is kept, like any other, only if its loss is no higher.

    Raises:
        InvalidProblemError: if every diagonal is zero, or the very first loss is not finite.
    """
    total = statistics.fisher_square_sum
    if not total > 0.0:
        raise InvalidProblemError("every diagonal Fisher is zero: there is nothing to factorize")
    dead_K = statistics.dead_K(state.components_KP)
    improved_KP, loss = _improved(state.components_KP, statistics)
    if state.n_accepted == 0 and not math.isfinite(loss):
        raise InvalidProblemError(f"the loss at the starting components is {loss}: the Fishers are out of range")
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
            weight=state.weight if state.plain else state.weight / _WEIGHT_SHRINKING,
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
        weight=min(state.weight_limit, _WEIGHT_GROWTH * state.weight),
        weight_limit=min(1.0, _LIMIT_GROWTH * state.weight_limit),
        plain=state.n_accepted == 0,
        n_accepted=state.n_accepted + 1,
    ), record


def diagonal_stopping_reason(state: DiagonalState, options: SolverOptions) -> str | None:
    """Why no further pass is to be made, or None. It depends on nothing else: a longer limit continues a run."""
    if state.n_small_steps >= _PATIENCE:
        return "converged"
    if state.iteration >= options.max_iterations:
        return "max_iterations"
    return None


def solve_diagonal(shards: Sequence[DiagonalShard], start_KP: Tensor, options: SolverOptions) -> Factorization:
    """Factorize the examples of all shards in this process, from the given components.

    Args:
        shards: in the order of the result's coefficients; their coefficients are where the first pass starts from.
        start_KP: from `initialize_diagonal`, or from another factorization; in the precision of the data.
        options: of the run.

    Raises:
        InvalidProblemError: no examples, more components than examples, or nothing but zeros.
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
    """One pass and one step, all in this process."""
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
    """The best components as unit rows, float64, and the lengths they had; one that is zero stays zero."""
    h_KP = state.best_components_KP.double()
    norms_K = torch.linalg.norm(h_KP, dim=1)
    return h_KP / torch.where(norms_K > 0, norms_K, 1.0)[:, None], norms_K


def finish_diagonal(shards: Sequence[DiagonalShard], state: DiagonalState) -> tuple[Tensor, DiagonalStatistics]:
    """The best components as unit rows; the coefficients of all shards become the optimal ones for them."""
    components_KP, norms_K = unit_components(state)
    statistics = DiagonalStatistics.zeros(*components_KP.shape, device=components_KP.device)
    for shard in shards:
        shard.rescale(norms_K)
        statistics.merge(shard.finish(components_KP))
    return components_KP, statistics


def _improved(components_KP: Tensor, statistics: DiagonalStatistics) -> tuple[Tensor, float]:
    """The components after some sweeps of HALS at fixed coefficients, and the loss there, accumulated in float64.

    Columns do not depend on each other, so that slabs of them are worked on one by one, in the cache.
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
    """How many of the latest steps in a row, this one included, say that the end is near.

    A plain step cannot raise the loss but by rounding: one that is rejected says so, whatever the tolerance.
    """
    scale = max(abs(loss), _UNEXPLAINED_FLOOR * total)
    rejected = not loss <= state.best_loss
    if abs(state.best_loss - loss) <= tolerance * scale or (rejected and state.plain):
        return state.n_small_steps + 1
    return state.n_small_steps if rejected else 0


def _reseeded(components_KP: Tensor, dead_K: Tensor, candidates: Candidates) -> Tensor:
    """With the candidates in the rows of dead components, worst-fitted example first."""
    offered_MP = candidates.directions_MD[candidates.residuals_M > 0]
    rows = dead_K.nonzero()[: len(offered_MP), 0]
    components_KP = components_KP.clone()
    components_KP[rows] = offered_MP[: len(rows)].to(components_KP)
    return components_KP
