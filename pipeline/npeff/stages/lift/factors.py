"""Lift of components of low-rank Fishers: a direction is a weighted sum of gradient rows.

Shapes: N examples of a shard, B batch, R rank, D sketch, K components, k components of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from npeff.directions import accumulate_directions, cosine, lift_weights
from npeff.gradients import GradientCollector
from npeff.sketches import Sketch

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

    def direction(self, component: int, vectors: list[Direction]) -> tuple[Direction, float]:
        """Return the component's direction, of any length, and its cosine with the fitted component."""
        ...


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
    """The `LiftRule` of low-rank Fishers: one sum for each component."""

    def __init__(self, solution: Solution, sketch: Sketch) -> None:
        self._solution, self._sketch = solution, sketch

    def n_rows(self, block: Sequence[int]) -> int:
        return len(block)

    def weights_of(self, block: Sequence[int]) -> WeightsOf:
        solution = self._solution

        def weights(examples: slice, arrays: Mapping[str, Tensor]) -> RowWeights:
            norms_N, weighted_NK = arrays["frobenius_norms"], solution.weighted_NK[examples]
            weights_kNR = lift_weights(
                arrays["factors"], weighted_NK, solution.components_KD, solution.gram_KK, block, norms_N
            )
            return RowWeights(weights_kNR)

        return weights

    def rows(self, block: Sequence[int], component: int) -> list[int]:
        return [block.index(component)]

    def direction(self, component: int, vectors: list[Direction]) -> tuple[Direction, float]:
        (direction,) = vectors
        sketched_D = self._sketch.apply_dense({name: tensor[None] for name, tensor in direction.items()})[0]
        return direction, cosine(sketched_D, self._solution.components_KD[component])
