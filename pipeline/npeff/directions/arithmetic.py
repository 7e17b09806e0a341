"""Inner products, cosines and orthogonal parts of directions in parameter space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from npeff.gradients import ParameterLayout

_LEAST_LEFT = 1e-3


def displacement(
    model: nn.Module, direction: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None = None
) -> float:
    """ĝᵀ(θ − θ₀), how far the parameters have gone along a unit direction ĝ from `origin`, θ₀, or from zero.

    A step of minus this takes that part out of them: θ − ĝ ĝᵀ(θ − θ₀), the projection that leaves nothing along ĝ.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = 0.0
    for name, tensor in direction.items():
        moved_by = parameters[name].detach().double()
        if origin is not None:
            moved_by = moved_by - origin[name].to(moved_by)
        total += float((moved_by * tensor.to(moved_by)).sum())
    return total


def orthogonalized(direction: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """The unit direction of what is left of a unit direction outside the span of others; None if that is too little
    (a thousandth of it) to be told from rounding."""
    if not others:
        return dict(direction)
    gram_ll = torch.tensor(
        [[inner_product(first, second) for second in others] for first in others], dtype=torch.float64
    )
    products_l = torch.tensor([inner_product(other, direction) for other in others], dtype=torch.float64)
    weights_l = torch.linalg.pinv(gram_ll, hermitian=True) @ products_l
    left = {}
    for name, tensor in direction.items():
        rest = tensor.double()
        for weight, other in zip(weights_l.tolist(), others, strict=True):
            rest = rest - weight * other[name].to(rest)
        left[name] = rest
    length = math.sqrt(inner_product(left, left))
    if length < _LEAST_LEFT:
        return None
    return {name: (rest / length).to(direction[name]) for name, rest in left.items()}


def inner_product(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Of two directions in parameter space, of which the first names the parameters; added up in float64."""
    return sum(float((first[name].double() * second[name].to(first[name]).double()).sum()) for name in first)


def parameter_norm(model: nn.Module, direction: Mapping[str, Tensor]) -> float:
    """‖θ‖₂ over the parameters that ``direction`` names: a step as long as this is no longer a perturbation."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return math.sqrt(sum(float(parameters[name].detach().double().square().sum()) for name in direction))


def zero_directions(
    layout: ParameterLayout,
    n_components: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Where directions are added up: (k, *shape) for each parameter."""
    return {
        name: torch.zeros(n_components, *shape, device=device, dtype=dtype)
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }


def cosine(first_D: Tensor, second_D: Tensor) -> float:
    """Of the angle between two vectors; 0 where one of them is zero."""
    first_D, second_D = first_D.double().cpu(), second_D.double().cpu()
    return float(first_D @ second_D / (first_D.norm() * second_D.norm()).clamp_min(1e-300))
