"""Kinds of Fishers: the interface between the distributed solver and the Fishers that it factorizes.

    state = kind.start(shard, kind.candidates(subsample), peers)
    while not kind.stopping_reason(state):
        sums = sum over workers of kind.accumulate(shard, state)                  # the only pass over the data
        offered = the replacements of all workers, if kind.dead_K(sums, state).any()
        state, record = kind.advance(state, sums, offered)
        kind.settle(shard, record.accepted)
    sums = sum over workers of kind.finish(shard, state)

`LowRankFishers` implements NPEFF for factors, and `DiagonalFishers` implements D-NPEFF for diagonals. Both only call
the functions of `npeff.factorization.solver` and `npeff.factorization.diagonals.solver`.

Shapes: N examples, M of the subsample, R rank, D dimension of a Fisher (sketch, groups or entries), K components,
C candidates.
"""

from __future__ import annotations

from typing import Any, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from npeff.factorization.diagonals.initialization import initialize_diagonal
from npeff.factorization.diagonals.shard import DiagonalShard, DiagonalStatistics
from npeff.factorization.diagonals.solver import (
    DiagonalState,
    advance_diagonal,
    diagonal_stopping_reason,
    initial_diagonal_state,
    unit_components,
)
from npeff.factorization.example_shard import ExampleShard
from npeff.factorization.initialization import candidate_components, most_useful
from npeff.factorization.objective import Candidates, Statistics
from npeff.factorization.problem import InvalidProblemError
from npeff.factorization.solver import (
    IterationRecord,
    SolverState,
    advance,
    free_dead,
    initial_state,
    stopping_reason,
)
from npeff.options.solver import SolverOptions


class Shard(Protocol):
    """A shard of the examples with their coefficients."""

    coefficients_NK: Tensor


class State(Protocol):
    """The state of the solver, without the examples and their coefficients."""

    def to(self, device: torch.device) -> Self:
        """Return the state with its tensors on a device."""
        ...

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return named arrays, from which `FisherKind.restore` restores the state exactly."""
        ...


class Sums(Protocol):
    """Sums over examples at given components. A step depends on the data only through these sums."""

    ww_KK: Tensor
    """WᵀW, float64."""
    fisher_square_sum: float
    """Σ_i ‖F̂_i‖²."""

    def pack(self) -> Tensor:
        """Return one float64 vector. The sum of two vectors is the vector of the union of the examples."""
        ...

    def loss(self, components_KD: Tensor) -> float:
        """Return the loss at the given components."""
        ...


class Peers(Protocol):
    """The workers of one factorization. Each has a shard and a copy of the state."""

    rank: int

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum the tensor over all workers, in place."""
        ...


_Shard = TypeVar("_Shard", bound=Shard, contravariant=True)
_State = TypeVar("_State", bound=State)
_Sums = TypeVar("_Sums", bound=Sums)


class FisherKind(Protocol[_Shard, _State, _Sums]):
    """The operations of the solver on a kind of Fisher. The constructor takes the options of the solver."""

    def candidates(self, subsample: Any, weights_M: Tensor, frozen_KD: Tensor | None) -> Tensor:
        """Return at least K candidates (C, D) for the starting components.

        Args:
            subsample: Fishers of M examples, in the form that the constructor of the kind's shard takes.
            weights_M: weights of these examples.
            frozen_KD: frozen components, which come first.
        """
        ...

    def start(self, shard: _Shard, candidates_CD: Tensor, peers: Peers) -> _State:
        """Return the state before the first pass, at K of the candidates. All workers must call it."""
        ...

    def restore(self, arrays: dict[str, np.ndarray]) -> _State:
        """Restore the state from the arrays of `State.to_arrays`."""
        ...

    def accumulate(self, shard: _Shard, state: _State) -> _Sums:
        """Improve the coefficients of the shard at the trial components and return the sums."""
        ...

    def unpacked(self, packed: Tensor, state: _State) -> _Sums:
        """The inverse of `Sums.pack`."""
        ...

    def dead_K(self, sums: _Sums, state: _State) -> Tensor:
        """Return the mask (K,) of the components that no example uses and that may be replaced."""
        ...

    def replacements(self, shard: _Shard, state: _State) -> Candidates:
        """Return replacements for dead components, computed from the worst-fitted examples of the shard."""
        ...

    def advance(self, state: _State, sums: _Sums, offered: Candidates | None) -> tuple[_State, IterationRecord]:
        """Accept or reject the trial components by the sums over all workers, and compute the next trial."""
        ...

    def settle(self, shard: _Shard, accepted: bool) -> None:
        """Keep or discard the coefficients of the last pass, as the kind requires."""
        ...

    def stopping_reason(self, state: _State) -> str | None:
        """Return the reason to stop, or None to continue."""
        ...

    def best_components(self, state: _State) -> Tensor:
        """Return the best accepted components (K, D) as unit rows, float64."""
        ...

    def finish(self, shard: _Shard, state: _State) -> _Sums:
        """Set the coefficients of the shard to their optimum at `best_components` and return the sums."""
        ...

    def penalties(self, sums: _Sums, components_KD: Tensor) -> float:
        """Return the penalties, the difference of objective and loss."""
        ...


class LowRankFishers:
    """Factors Â (N, R, D), in an `ExampleShard`."""

    def __init__(self, options: SolverOptions) -> None:
        self._options = options

    def candidates(self, subsample: Tensor, weights_M: Tensor, frozen_KD: Tensor | None) -> Tensor:
        return candidate_components(subsample, self._options, weights_M, frozen_KD)

    def start(self, shard: ExampleShard, candidates_CD: Tensor, peers: Peers) -> SolverState:
        options = self._options
        if len(candidates_CD) > options.n_components:
            ww_CC = peers.sum_(shard.coefficient_products(candidates_CD, l1=options.l1))
            kept_C = most_useful(candidates_CD, ww_CC, options.n_components, options.n_frozen).double()
            # The mask of worker 0 is used: rounding on different machines could break ties differently.
            candidates_CD = candidates_CD[peers.sum_(kept_C if peers.rank == 0 else 0 * kept_C) > 0]
        return initial_state(candidates_CD, options)

    def restore(self, arrays: dict[str, np.ndarray]) -> SolverState:
        return SolverState.from_arrays(arrays)

    def accumulate(self, shard: ExampleShard, state: SolverState) -> Statistics:
        return shard.accumulate(state.components_KD, l1=self._options.l1)

    def unpacked(self, packed: Tensor, state: SolverState) -> Statistics:
        return Statistics.unpack(packed, *state.components_KD.shape)

    def dead_K(self, sums: Statistics, state: SolverState) -> Tensor:
        return free_dead(sums, self._options)

    def replacements(self, shard: ExampleShard, state: SolverState) -> Candidates:
        return shard.candidates(state.components_KD)

    def advance(
        self, state: SolverState, sums: Statistics, offered: Candidates | None
    ) -> tuple[SolverState, IterationRecord]:
        return advance(state, sums, self._options, offered)

    def settle(self, shard: ExampleShard, accepted: bool) -> None:
        """Do nothing: the coefficients of a rejected step are kept too."""

    def stopping_reason(self, state: SolverState) -> str | None:
        return stopping_reason(state, self._options)

    def best_components(self, state: SolverState) -> Tensor:
        return state.best_components_KD

    def finish(self, shard: ExampleShard, state: SolverState) -> Statistics:
        return shard.finish(state.best_components_KD, l1=self._options.l1)

    def penalties(self, sums: Statistics, components_KD: Tensor) -> float:
        return sums.penalties(components_KD, self._options.l1, self._options.orthogonality)


class DiagonalFishers:
    """Diagonals f̂ (N, D), in a `DiagonalShard`; examples have no weights.

    Raises:
        InvalidProblemError: if the options set penalties or frozen components, which D-NPEFF does not support.
    """

    def __init__(self, options: SolverOptions) -> None:
        if options.l1 or options.orthogonality or options.n_frozen:
            raise InvalidProblemError("l1, orthogonality and frozen components need low-rank Fishers: remove them")
        self._options = options

    def candidates(self, subsample: Any, weights_M: Tensor, frozen_KD: Tensor | None) -> Tensor:
        options = self._options
        return initialize_diagonal(subsample, options.n_components, options.seed, options.n_starts)

    def start(self, shard: DiagonalShard, candidates_CD: Tensor, peers: Peers) -> DiagonalState:
        return initial_diagonal_state(candidates_CD, self._options)

    def restore(self, arrays: dict[str, np.ndarray]) -> DiagonalState:
        return DiagonalState.from_arrays(arrays)

    def accumulate(self, shard: DiagonalShard, state: DiagonalState) -> DiagonalStatistics:
        return shard.accumulate(state.components_KP)

    def unpacked(self, packed: Tensor, state: DiagonalState) -> DiagonalStatistics:
        return DiagonalStatistics.unpack(packed, *state.components_KP.shape)

    def dead_K(self, sums: DiagonalStatistics, state: DiagonalState) -> Tensor:
        return sums.dead_K(state.components_KP)

    def replacements(self, shard: DiagonalShard, state: DiagonalState) -> Candidates:
        return shard.candidates(state.components_KP)

    def advance(
        self, state: DiagonalState, sums: DiagonalStatistics, offered: Candidates | None
    ) -> tuple[DiagonalState, IterationRecord]:
        return advance_diagonal(state, sums, self._options, offered)

    def settle(self, shard: DiagonalShard, accepted: bool) -> None:
        shard.settle(accepted)

    def stopping_reason(self, state: DiagonalState) -> str | None:
        return diagonal_stopping_reason(state, self._options)

    def best_components(self, state: DiagonalState) -> Tensor:
        return unit_components(state)[0]

    def finish(self, shard: DiagonalShard, state: DiagonalState) -> DiagonalStatistics:
        components_KP, lengths_K = unit_components(state)
        shard.rescale(lengths_K)
        return shard.finish(components_KP)

    def penalties(self, sums: DiagonalStatistics, components_KD: Tensor) -> float:
        return 0.0
