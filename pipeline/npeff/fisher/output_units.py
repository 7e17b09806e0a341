"""Groups of parameter entries, one for each output unit of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npeff.gradients import ParameterLayout
from npeff.gradients.layer_rules import linear, rule_for


@dataclass(frozen=True)
class GroupLayout:
    """Groups of parameter entries, one for each output unit.

    The output units of a layer are the rows of a Linear weight, the filters of a convolution, the columns of an
    embedding and the features of a norm. The `weight` and `bias` of a module that have one each share their groups. Any
    other parameter is split along its first axis. A scalar is a group of its own.
    """

    counts: tuple[tuple[str, int], ...]
    """The name of the first parameter of consecutive groups, and the number of these groups."""
    parts: Mapping[str, tuple[int | None, int]]
    """Maps the name of a parameter to the axis along which it is split (None for a scalar) and its first group."""

    @classmethod
    def of(cls, model: nn.Module, layout: ParameterLayout) -> GroupLayout:
        """Construct the groups of the parameters of `layout` from the layer types of `model`."""
        parts: dict[str, tuple[int | None, int]] = {}
        found: dict[tuple[str, str, int], int] = {}
        counts: list[tuple[str, int]] = []
        n_groups = 0
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            owner, _, leaf = name.rpartition(".")
            axis = _output_axis(model.get_submodule(owner), leaf, len(shape))
            count = 1 if axis is None else shape[axis]
            key = owner, "" if leaf in ("weight", "bias") else leaf, count
            if key not in found:
                found[key] = n_groups
                counts.append((name, count))
                n_groups += count
            parts[name] = axis, found[key]
        return cls(tuple(counts), parts)

    @property
    def n_groups(self) -> int:
        """Q, the number of groups."""
        return sum(count for _, count in self.counts)

    def names(self) -> list[tuple[str, int]]:
        """Return the parameter name and the index of each group.

        A group that a weight and a bias share has the name of the one that comes first.
        """
        return [(name, index) for name, count in self.counts for index in range(count)]

    def sums(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Sum the entries of each group over tensors with the shapes of the parameters: (Q,), float64, on the CPU."""
        sums_Q = torch.zeros(self.n_groups, dtype=torch.float64)
        for name, tensor in tensors.items():
            axis, first = self.parts[name]
            values = tensor.detach().double().cpu()
            along = (
                values.reshape(1) if axis is None else values.movedim(axis, 0).reshape(tensor.shape[axis], -1).sum(1)
            )
            sums_Q[first : first + len(along)] += along
        return sums_Q


_OUTPUTS_SECOND = nn.Embedding | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def _output_axis(module: nn.Module, leaf: str, n_axes: int) -> int | None:
    if n_axes == 0:
        return None
    transposed = rule_for(module, (leaf,)) is linear and not isinstance(module, nn.Linear)
    return 1 if n_axes > 1 and (transposed or isinstance(module, _OUTPUTS_SECOND)) else 0
