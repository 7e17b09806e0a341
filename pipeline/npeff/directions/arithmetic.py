"""Inner products, cosines and orthogonal parts of directions in parameter space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from npeff.gradients import ParameterLayout, in_memory

_MIN_REMAINDER = 1e-3
"""Length of the orthogonal part of a unit direction below which it cannot be distinguished from rounding."""


def displacement(
    model: nn.Module, direction: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None = None
) -> float:
    """Compute ĝᵀ(θ − θ₀), the displacement of the parameters along a unit direction ĝ.

    A step of minus this length removes the displacement: θ − ĝ ĝᵀ(θ − θ₀) has no displacement along ĝ.

    Args:
        model: The model with parameters θ.
        direction: The unit direction ĝ, by parameter name.
        origin: The parameters θ₀. The default is zero.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = 0.0
    for name, tensor in direction.items():
        with in_memory([parameters[name]]):
            change = parameters[name].detach().double()
        if origin is not None:
            change = change - origin[name].to(change)
        total += float((change * tensor.to(change)).sum())
    return total


def orthogonalized(direction: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """Return the unit direction of the part of a unit direction that is orthogonal to the span of others.

    Return None if the length of this part is below 1/1000, which cannot be distinguished from rounding.
    """
    if not others:
        return dict(direction)
    gram_ll = torch.tensor(
        [[inner_product(first, second) for second in others] for first in others], dtype=torch.float64
    )
    products_l = torch.tensor([inner_product(other, direction) for other in others], dtype=torch.float64)
    weights_l = torch.linalg.pinv(gram_ll, hermitian=True) @ products_l
    remainder = {}
    for name, tensor in direction.items():
        rest = tensor.double()
        for weight, other in zip(weights_l.tolist(), others, strict=True):
            rest = rest - weight * other[name].to(rest)
        remainder[name] = rest
    length = math.sqrt(inner_product(remainder, remainder))
    if length < _MIN_REMAINDER:
        return None
    return {name: (rest / length).to(direction[name]) for name, rest in remainder.items()}


def inner_product(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Compute the inner product of two directions in float64, over the parameters that ``first`` contains."""
    return sum(float((first[name].double() * second[name].to(first[name]).double()).sum()) for name in first)


def gram(first: Sequence[Mapping[str, Tensor]], second: Sequence[Mapping[str, Tensor]]) -> NDArray[np.float64]:
    """Compute the inner products of directions in float64, (len(first), len(second))."""
    total = torch.zeros(len(first), len(second), dtype=torch.float64)
    for name in first[0]:
        rows, columns = (torch.stack([each[name].flatten() for each in group]).double() for group in (first, second))
        total += rows @ columns.T
    return total.numpy()


def parameter_norm(model: nn.Module, direction: Mapping[str, Tensor]) -> float:
    """Compute ‖θ‖₂ over the parameters that ``direction`` contains.

    A step of this length is too large to be a perturbation.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = 0.0
    for name in direction:
        with in_memory([parameters[name]]):
            total += float(parameters[name].detach().double().square().sum())
    return math.sqrt(total)


def zero_directions(
    layout: ParameterLayout,
    n_components: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Return zero tensors (k, *shape) by parameter name, to which directions can be added."""
    return {
        name: torch.zeros(n_components, *shape, device=device, dtype=dtype)
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }


def cosine(first_D: Tensor, second_D: Tensor) -> float:
    """Compute the cosine of the angle between two vectors. The cosine is 0 if one vector is zero."""
    first_D, second_D = first_D.double().cpu(), second_D.double().cpu()
    return float(first_D @ second_D / (first_D.norm() * second_D.norm()).clamp_min(1e-300))
