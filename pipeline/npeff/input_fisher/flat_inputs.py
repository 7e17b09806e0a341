"""The inputs of a batch in one layout: positions, and features of each position.

Legend: B examples, P positions, F features of a position, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlatInputs:
    """The inputs of a batch, with the logits of the model as a function of them."""

    values_BPF: Tensor
    """Floating point."""
    logits: Callable[[Tensor], Tensor]
    """Function of values (B, P, F) that returns logits (B, C), or (B, T, C) for examples with T predictions."""
    used_BP: Tensor
    """Bool: the positions that are inputs of the example. The others, such as padding, are never changed."""
    exchangeable: bool = False
    """Whether all positions have the same distribution, and examples may have different numbers of positions."""

    @classmethod
    def of(
        cls,
        values: Tensor,
        logits: Callable[[Tensor], Tensor],
        positions: Sequence[int] | None = None,
        used_BP: Tensor | None = None,
        exchangeable: bool = False,
    ) -> FlatInputs:
        """Return inputs (B, ...) of any shape in the flat layout.

        Args:
            values: The inputs, floating point.
            logits: Function of values of this shape.
            positions: Axes that number the positions. The other axes, except axis 0, number the features. None: every
                entry is a position with one feature.
            used_BP: As in the class. None: all positions are used.
            exchangeable: As in the class.
        """
        shape = values.shape
        at = tuple(range(1, len(shape))) if positions is None else tuple(positions)
        order = (0, *at, *(axis for axis in range(1, len(shape)) if axis not in at))
        back = tuple(order.index(axis) for axis in range(len(shape)))
        permuted_shape = [shape[axis] for axis in order]
        n_positions = math.prod(shape[axis] for axis in at)

        def of_flat(values_BPF: Tensor) -> Tensor:
            return logits(values_BPF.reshape(len(values_BPF), *permuted_shape[1:]).permute(back))

        values_BPF = values.permute(order).reshape(shape[0], n_positions, -1)
        if used_BP is None:
            used_BP = torch.ones(values_BPF.shape[:2], dtype=torch.bool, device=values.device)
        return cls(values_BPF, of_flat, used_BP, exchangeable)
