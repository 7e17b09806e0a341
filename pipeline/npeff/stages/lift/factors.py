"""Lift of components of low-rank Fishers: a direction is a weighted sum of gradient rows.

Shapes: N examples of a shard, B batch, R rank, D sketch, K components, k components of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from npeff.directions import accumulate_directions, cosine, lift_weights
from npeff.gradients import GradientCollector
from npeff.stages.lift.files import Combinations

Direction = dict[str, Tensor]
"""A tensor for each parameter, in the order of the layout."""


@dataclass(frozen=True)
class Solution:
    """The factorization to lift. Coefficients of examples that were not fitted on are zero."""

    components_KD: Tensor
    coefficients_NK: Tensor
    """W."""
    weighted_NK: Tensor
    """v_i W_i, with the weights v of the examples in the loss."""
    gram_KK: Tensor
    """Σ_i v_i W_i W_iᵀ, float64."""
    fit_N: Tensor
    """Mask of the fitted examples."""
    weights_N: Tensor
    """v, and 0 for examples that were not fitted on."""


class ShardWeights(Protocol):
    """The contributions of the examples of a stored shard to the sums of a block."""

    used_N: Tensor
    """Mask of the examples with a nonzero contribution."""

    def add(
        self,
        collector: GradientCollector,
        batch: Any,
        places_B: Tensor,
        sums: Direction,
        examples: Sequence[int],
        targets: Tensor | None,
    ) -> None:
        """Add the contributions of a batch to the sums, in place. ``places_B`` are its positions in the shard."""
        ...


WeightsOf = Callable[[slice, Mapping[str, Tensor]], ShardWeights]
"""Returns the weights of a stored shard, given the slice of its examples in the store and its arrays."""


class LiftRule(Protocol):
    """The sums for a block of components of one kind of Fisher, and the directions computed from the sums."""

    def n_rows(self, block: Sequence[int]) -> int:
        """Return the number of sums of a block. Each sum has the size of all parameters."""
        ...

    def weights_of(self, block: Sequence[int]) -> WeightsOf:
        """Return a function for the weights of the shards in a block's sums."""
        ...

    def rows(self, block: Sequence[int], component: int) -> list[int]:
        """Return the indices of the block's sums that determine a component's direction."""
        ...

    def direction(self, component: int, vectors: list[Direction]) -> Lifted:
        """Return the component's direction from these sums."""
        ...

    def lift_cosine(self, component: int, vectors: list[Direction], sketch_D: Tensor) -> float:
        """Return the cosine that shows whether the lift agrees with the fitted component.

        ``sketch_D`` is the sketch of the direction.
        """
        ...


@dataclass(frozen=True)
class Lifted:
    direction: Direction
    """Of any length."""
    cosine_own: float
    """Cosine with the component's own direction."""
    sketch_D: Tensor | None = None
    """Sketch of the unit direction, if it is known from the stored factors. It agrees with them better than the sketch
    that is computed from the direction, because their rows are calibrated."""


class RowWeights:
    """Weights (k, N, R) of gradient rows."""

    def __init__(self, weights_kNR: Tensor) -> None:
        self._weights_kNR = weights_kNR
        self.used_N = weights_kNR.abs().amax(dim=(0, 2)) != 0

    def add(
        self,
        collector: GradientCollector,
        batch: Any,
        places_B: Tensor,
        sums: Direction,
        examples: Sequence[int],
        targets: Tensor | None,
    ) -> None:
        accumulate_directions(collector, batch, self._weights_kNR[:, places_B], sums, examples, targets)


class FactorLift:
    """The `LiftRule` of low-rank Fishers: one sum for each component.

    Args:
        solution: the factorization to lift.
        file: the file of the `Combinations`. It may be written after construction. None for own directions whose
            sketches are not known.
    """

    def __init__(self, solution: Solution, file: Path | None) -> None:
        self._solution, self._file = solution, file

    @cached_property
    def _combinations(self) -> Combinations | None:
        return None if self._file is None else Combinations.read(self._file)

    def n_rows(self, block: Sequence[int]) -> int:
        return len(block)

    def weights_of(self, block: Sequence[int]) -> WeightsOf:
        solution, combinations = self._solution, self._combinations
        of_sums_KK = None if combinations is None else combinations.of_sums_KK

        def weights(examples: slice, arrays: Mapping[str, Tensor]) -> RowWeights:
            norms_N, weighted_NK = arrays["frobenius_norms"], solution.weighted_NK[examples]
            weights_kNR = lift_weights(
                arrays["factors"], weighted_NK, solution.components_KD, solution.gram_KK, block, norms_N, of_sums_KK
            )
            return RowWeights(weights_kNR)

        return weights

    def rows(self, block: Sequence[int], component: int) -> list[int]:
        return [block.index(component)]

    def direction(self, component: int, vectors: list[Direction]) -> Lifted:
        combinations = self._combinations
        if combinations is None:
            return Lifted(vectors[0], 1.0)
        return Lifted(vectors[0], float(combinations.found.cosines_K[component]), combinations.sketches_KD[component])

    def lift_cosine(self, component: int, vectors: list[Direction], sketch_D: Tensor) -> float:
        components_KD, combinations = self._solution.components_KD, self._combinations
        if combinations is None:
            return cosine(sketch_D, components_KD[component])
        return cosine(sketch_D, combinations.found.combinations_KK[component] @ components_KD.double())
