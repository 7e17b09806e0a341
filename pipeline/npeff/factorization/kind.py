"""Kinds of Fishers: what a solver needs to know of the Fishers that it factorizes, so that one solver serves all kinds.

    state = kind.start(shard, kind.candidates(subsample), peers)
    while not kind.stopping_reason(state):
        sums = sum over workers of kind.accumulate(shard, state)                  # the only pass over the data
        offered = the replacements of all workers, if kind.dead_K(sums, state).any()
        state, record = kind.advance(state, sums, offered)
        kind.settle(shard, record.accepted)
    sums = sum over workers of kind.finish(shard, state)

`LowRankFishers` are factors (NPEFF), `DiagonalFishers` are diagonals (D-NPEFF). Neither adds to the functions that it
names: see `npeff.factorization.solver` and `npeff.factorization.diagonals.solver`.

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
    """Examples with their coefficients."""

    coefficients_NK: Tensor


class State(Protocol):
    """All that the next step depends on, besides the examples and their coefficients."""

    def to(self, device: torch.device) -> Self:
        """The same state with its tensors on a device."""
        ...

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays, from which `FisherKind.restore` restores the state exactly."""
        ...


class Sums(Protocol):
    """Sums over examples at given components: all that a step needs of the data."""

    ww_KK: Tensor
    """WᵀW, float64."""
    fisher_square_sum: float
    """Σ_i ‖F̂_i‖²."""

    def pack(self) -> Tensor:
        """One float64 vector; the sum of two of them is that of the examples of both."""
        ...

    def loss(self, components_KD: Tensor) -> float:
        """The loss at these components."""
        ...


class Peers(Protocol):
    """The workers that solve one problem together; each has a shard and a copy of the state."""

    rank: int

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in place."""
        ...


_Shard = TypeVar("_Shard", bound=Shard, contravariant=True)
_State = TypeVar("_State", bound=State)
_Sums = TypeVar("_Sums", bound=Sums)


class FisherKind(Protocol[_Shard, _State, _Sums]):
    """What a solver needs of a kind of Fisher. An implementation is constructed with the solver's options."""

    def candidates(self, subsample: Any, weights_M: Tensor, frozen_KD: Tensor | None) -> Tensor:
        """Components to start from (C, D), K of them or more.

        Args:
            subsample: Fishers of M examples, as the constructor of the kind's shard takes them.
            weights_M: of these examples.
            frozen_KD: components that are to come first, and to stay.
        """
        ...

    def start(self, shard: _Shard, candidates_CD: Tensor, peers: Peers) -> _State:
        """The state before the first pass, at K of the candidates. All peers call it together."""
        ...

    def restore(self, arrays: dict[str, np.ndarray]) -> _State:
        """The state of `State.to_arrays`."""
        ...

    def accumulate(self, shard: _Shard, state: _State) -> _Sums:
        """Improve the shard's coefficients at the state's trial components; its sums there."""
        ...

    def unpacked(self, packed: Tensor, state: _State) -> _Sums:
        """The inverse of `Sums.pack`."""
        ...

    def dead_K(self, sums: _Sums, state: _State) -> Tensor:
        """Mask of the components that no example uses, and that may be replaced."""
        ...

    def replacements(self, shard: _Shard, state: _State) -> Candidates:
        """What the shard's worst-fitted examples offer in place of dead components."""
        ...

    def advance(self, state: _State, sums: _Sums, offered: Candidates | None) -> tuple[_State, IterationRecord]:
        """Judge the trial components by the sums over all workers, and propose the next ones."""
        ...

    def settle(self, shard: _Shard, accepted: bool) -> None:
        """Keep the coefficients of the last pass, or go back, as the kind requires."""
        ...

    def stopping_reason(self, state: _State) -> str | None:
        """Why no further pass is to be made, or None."""
        ...

    def best_components(self, state: _State) -> Tensor:
        """The best accepted components (K, D) as unit rows, float64."""
        ...

    def finish(self, shard: _Shard, state: _State) -> _Sums:
        """Set the shard's coefficients to their optimum at `best_components`; its sums there."""
        ...

    def penalties(self, sums: _Sums, components_KD: Tensor) -> float:
        """What the objective adds to the loss."""
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
            # Worker 0 decides: where two are equally useful, the rounding of unlike machines could decide differently.
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
        """Coefficients stay: they are improved in place, whether or not the components are accepted."""

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
        InvalidProblemError: the options ask for penalties or frozen components, which D-NPEFF does not have.
    """

    def __init__(self, options: SolverOptions) -> None:
        if options.l1 or options.orthogonality or options.n_frozen:
            raise InvalidProblemError("l1, orthogonality and frozen components are for low-rank Fishers: remove them")
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
