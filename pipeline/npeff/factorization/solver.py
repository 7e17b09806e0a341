"""Alternating non-negative coefficients and damped Gauss-Newton steps on the components.

    state = initial_state(components, options)
    while not stopping_reason(state, options):
        statistics = sum over shards of shard.accumulate(state.components_KD)          # the only pass over the data
        state, record = advance(state, statistics, options, candidates if a component is dead)

`solve` is this loop in memory. A distributed run is the same, except that the sum is an all-reduce: each worker
computes the same steps on its own copy of the state. The damping μ follows Levenberg & Marquardt. A trial that
increases the objective is rejected, and the step is repeated from the best state with 8 μ. Otherwise the trial is
accepted, and μ is halved. The result is the best accepted components, never a rejected trial.

Shapes: N examples, K components, D sketch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npeff.factorization.example_shard import ExampleShard
from npeff.factorization.gauss_newton import gauss_newton_step
from npeff.factorization.matching import canonical_order, near_duplicates
from npeff.factorization.objective import Candidates, Statistics, explained, merge_candidates
from npeff.factorization.problem import InvalidProblemError, validate_size
from npeff.options.solver import SolverOptions

_FIRST_DAMPING = 1e-2
_LEAST_DAMPING = 1e-4
_STALLED_DAMPING = 1e8
"""μ is relative to the mean of diag(WW), so it is the same for a data set and for two copies of the data set."""

_PATIENCE = 3
"""Number of steps in a row that must change the objective by less than the tolerance."""

_UNEXPLAINED_FLOOR = 1e-6
"""Lower bound of the objective, as a fraction of Σ‖F̂_i‖², in the relative change of the convergence test."""


@dataclass(frozen=True)
class IterationRecord:
    """One row of the history, for one pass over the data. The fields are columns of the table `history`."""

    iteration: int
    loss: float
    """Loss at the trial components, without penalties. If the step was rejected, these components are discarded."""
    objective: float
    """Loss plus penalties, which decides whether the step is accepted."""
    explained: float
    """1 − loss / Σ_i ‖F̂_i‖²."""
    mu: float
    """NPEFF: damping parameter μ of the step to the trial components. D-NPEFF: extrapolation parameter β of the trial,
    0 if the trial is not extrapolated."""
    accepted: bool
    n_dead: int
    """Number of components that no example uses."""


@dataclass(frozen=True)
class SolverState:
    """State of the solver, without the examples and their coefficients. Tensors are float64."""

    components_KD: Tensor
    """The next trial (K, D)."""
    best_components_KD: Tensor
    best_statistics: Statistics
    best_objective: float
    """Loss plus penalties of the best components."""
    mu: float
    """Damping parameter μ of the next step."""
    iteration: int
    """Number of completed passes."""
    n_accepted: int
    n_small_steps: int
    """Number of last steps in a row that changed the objective by less than the tolerance."""

    def to(self, device: torch.device) -> SolverState:
        """Return the state with its tensors on a device."""
        statistics = self.best_statistics
        return dataclasses.replace(
            self,
            components_KD=self.components_KD.to(device),
            best_components_KD=self.best_components_KD.to(device),
            best_statistics=dataclasses.replace(
                statistics, u_KD=statistics.u_KD.to(device), ww_KK=statistics.ww_KK.to(device)
            ),
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return named arrays, with scalars as 0-d arrays. `from_arrays` restores the state exactly."""
        tensors = {
            "components": self.components_KD,
            "best_components": self.best_components_KD,
            "best_statistics": self.best_statistics.pack(),
        }
        scalars = {name: getattr(self, name) for name in _SCALAR_FIELDS}
        return {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()} | {
            name: np.asarray(value, dtype=_SCALAR_FIELDS[name]) for name, value in scalars.items()
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> SolverState:
        """Invert `to_arrays`."""
        components_KD = torch.from_numpy(arrays["components"].copy())
        packed = torch.from_numpy(arrays["best_statistics"].copy())
        return cls(
            components_KD=components_KD,
            best_components_KD=torch.from_numpy(arrays["best_components"].copy()),
            best_statistics=Statistics.unpack(packed, *components_KD.shape),
            **{name: arrays[name].item() for name in _SCALAR_FIELDS},
        )


_SCALAR_FIELDS: dict[str, type[np.generic]] = {
    "best_objective": np.float64,
    "mu": np.float64,
    "iteration": np.int64,
    "n_accepted": np.int64,
    "n_small_steps": np.int64,
}


@dataclass(frozen=True)
class Factorization:
    """The result: components in canonical order, their optimal coefficients, and the history."""

    components_KD: Tensor
    """Unit rows (K, D), float64."""
    coefficients_NK: Tensor
    """(N, K), in the precision of the factors."""
    loss: float
    """Σ_i ‖F̂_i − Σ_j W_ij h_j h_jᵀ‖² at these components and coefficients."""
    objective: float
    """Loss plus penalties."""
    explained: float
    history: list[IterationRecord]
    n_iter: int
    stopped: str
    """Stopping reason: "converged", "max_iterations" or "stalled"."""
    near_duplicates: list[tuple[int, int, float]]


def initial_state(components_KD: Tensor, options: SolverOptions) -> SolverState:
    """Return the state before the first pass, whose trial is the given components, with normalized rows.

    Raises:
        InvalidProblemError: if there are not n_components rows, or one is zero or not finite.
    """
    if components_KD.ndim != 2 or len(components_KD) != options.n_components:
        raise InvalidProblemError(
            f"starting components of shape {tuple(components_KD.shape)} do not fit n_components={options.n_components}"
        )
    components_KD = components_KD.double()
    norms = torch.linalg.norm(components_KD, dim=1)
    if not bool((torch.isfinite(norms) & (norms > 0)).all()):
        raise InvalidProblemError("every starting component must be finite and not zero")
    components_KD = components_KD / norms[:, None]
    return SolverState(
        components_KD=components_KD,
        best_components_KD=components_KD,
        best_statistics=Statistics.zeros(*components_KD.shape, device=components_KD.device),
        best_objective=math.inf,
        mu=_FIRST_DAMPING,
        iteration=0,
        n_accepted=0,
        n_small_steps=0,
    )


def advance(
    state: SolverState, statistics: Statistics, options: SolverOptions, candidates: Candidates | None = None
) -> tuple[SolverState, IterationRecord]:
    """Accept or reject the trial by its statistics, and compute the next trial.

    Args:
        state: state with the trial `components_KD`.
        statistics: statistics of all examples at the trial.
        options: options of the solver.
        candidates: replacements from all examples at the trial. They replace dead components in the next trial, which
            is accepted only if its objective is not larger, like every trial.

    Returns:
        The next state and the record of the step.

    Raises:
        InvalidProblemError: if every factor is zero, or the first loss is not finite.
    """
    loss, total = statistics.loss(state.components_KD), statistics.fisher_square_sum
    objective = loss + statistics.penalties(state.components_KD, options.l1, options.orthogonality)
    if not total > 0.0:
        raise InvalidProblemError("every factor is zero: there is nothing to factorize")
    if state.n_accepted == 0 and not math.isfinite(objective):
        raise InvalidProblemError(f"the factors are out of range, as the loss at the start is {loss}: rescale them")
    accepted = objective <= state.best_objective
    dead_K = free_dead(statistics, options)
    record = IterationRecord(
        iteration=state.iteration + 1,
        loss=loss,
        objective=objective,
        explained=explained(loss, total),
        mu=state.mu,
        accepted=accepted,
        n_dead=int(dead_K.sum()),
    )
    # A rejected trial with an objective equal up to the tolerance indicates convergence, as an accepted one does.
    scale = max(abs(objective), _UNEXPLAINED_FLOOR * total)
    if abs(state.best_objective - objective) <= options.tolerance * scale:
        n_small_steps = state.n_small_steps + 1
    else:
        n_small_steps = 0 if accepted else state.n_small_steps
    judged = dataclasses.replace(state, iteration=state.iteration + 1, n_small_steps=n_small_steps)
    if accepted:
        judged = dataclasses.replace(
            judged,
            best_components_KD=state.components_KD,
            best_statistics=statistics,
            best_objective=objective,
            mu=max(state.mu / 2, _LEAST_DAMPING),
            n_accepted=state.n_accepted + 1,
        )
    else:
        judged = dataclasses.replace(judged, mu=state.mu * 8)
    trial_KD = _next_trial(judged, options)
    if accepted and candidates is not None:
        _reseed_(trial_KD, dead_K, candidates)
    return dataclasses.replace(judged, components_KD=trial_KD), record


def free_dead(statistics: Statistics, options: SolverOptions) -> Tensor:
    """Return the mask (K,) of the components that no example uses and that are not frozen."""
    dead_K = statistics.dead_K.clone()
    dead_K[: options.n_frozen] = False
    return dead_K


def stopping_reason(state: SolverState, options: SolverOptions) -> str | None:
    """Return the reason to stop, or None to continue.

    The result depends only on the arguments, so a run continues if `max_iterations` is increased.
    """
    if state.n_small_steps >= _PATIENCE:
        return "converged"
    if state.mu > _STALLED_DAMPING:
        return "stalled"
    if state.iteration >= options.max_iterations:
        return "max_iterations"
    return None


def solve(
    shards: Sequence[ExampleShard],
    start_KD: Tensor,
    options: SolverOptions,
    on_iteration: Callable[[SolverState, IterationRecord], object] | None = None,
) -> Factorization:
    """Factorize the examples of all shards in this process, starting from the given components.

    Args:
        shards: the examples, in the order of the coefficients of the result. The first pass starts from the
            coefficients of the shards.
        start_KD: starting components, from `initialize` or another factorization.
        options: options of the solver.
        on_iteration: called after each pass with the new state and the record.

    Raises:
        InvalidProblemError: if there are no examples, more components than factor rows, or only zero factors.
    """
    validate_size(sum(s.n_examples for s in shards), max((s.rank for s in shards), default=0), options.n_components)
    state = initial_state(start_KD, options)
    history: list[IterationRecord] = []
    while (stopped := stopping_reason(state, options)) is None:
        statistics = Statistics.zeros(*state.components_KD.shape, device=state.components_KD.device)
        for shard in shards:
            statistics.merge(shard.accumulate(state.components_KD, l1=options.l1))
        candidates = None
        if bool(free_dead(statistics, options).any()):
            candidates = merge_candidates([shard.candidates(state.components_KD) for shard in shards])
        state, record = advance(state, statistics, options, candidates)
        history.append(record)
        if on_iteration is not None:
            on_iteration(state, record)
    return _result(shards, state, history, stopped, options)


def _next_trial(state: SolverState, options: SolverOptions) -> Tensor:
    h_KD, statistics = state.best_components_KD, state.best_statistics
    damping = state.mu * float(statistics.energy_K.mean())
    if damping == 0.0:  # No example uses any component: no step is possible, only replacements.
        return h_KD.clone()
    u_KD, pressure = statistics.u_KD, statistics.orthogonality_weight(options.orthogonality)
    if options.l1 or options.orthogonality:
        # With penalties, the gradient has a part along h_j itself, which the normalization cancels. Only the part
        # orthogonal to h_j is used; otherwise the step may not be a descent step.
        cosines_KK = h_KD @ h_KD.T
        target_KK = (statistics.ww_KK + pressure) * cosines_KK
        target_KK.diagonal().sub_(pressure)
        descent_KD = u_KD - target_KK @ h_KD
        u_KD = u_KD - torch.sum(descent_KD * h_KD, dim=1, keepdim=True) * h_KD
    trial_KD = h_KD + gauss_newton_step(
        h_KD,
        u_KD,
        statistics.ww_KK,
        damping,
        orthogonality=pressure,
        n_frozen=options.n_frozen,
    )
    trial_KD = trial_KD / torch.linalg.norm(trial_KD, dim=1, keepdim=True)
    trial_KD[: options.n_frozen] = h_KD[: options.n_frozen]
    result: Tensor = trial_KD
    return result


def _reseed_(components_KD: Tensor, dead_K: Tensor, candidates: Candidates) -> None:
    """Put the candidates in the rows of dead components, worst-fitted example first."""
    offered = candidates.directions_MD[candidates.residuals_M > 0]
    rows = dead_K.nonzero()[: len(offered), 0]
    components_KD[rows] = offered[: len(rows)].to(components_KD)


def _result(
    shards: Sequence[ExampleShard],
    state: SolverState,
    history: list[IterationRecord],
    stopped: str,
    options: SolverOptions,
) -> Factorization:
    components_KD = state.best_components_KD
    statistics = Statistics.zeros(*components_KD.shape, device=components_KD.device)
    for shard in shards:
        statistics.merge(shard.finish(components_KD, l1=options.l1))
    coefficients_NK = torch.cat([shard.coefficients_NK for shard in shards])
    loss = statistics.loss(components_KD)
    order, signs = canonical_order(components_KD, statistics.energy_K, options.n_frozen)
    components_KD = components_KD[order] * signs[:, None]
    return Factorization(
        components_KD=components_KD,
        coefficients_NK=coefficients_NK[:, order],
        loss=loss,
        objective=loss + statistics.penalties(components_KD, options.l1, options.orthogonality),
        explained=explained(loss, statistics.fisher_square_sum),
        history=history,
        n_iter=state.iteration,
        stopped=stopped,
        near_duplicates=near_duplicates(components_KD),
    )
