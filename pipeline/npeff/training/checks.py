"""Checks of numbers and of gradients that several parts of training share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from npeff.training.errors import TrainingError


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: object) -> bool:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def checked_damping(damping: object) -> float:
    """Return the damping of a natural gradient.

    Raises:
        TrainingError: It is not a finite number above 0.
    """
    if not is_number(damping) or damping <= 0:  # type: ignore[operator]  # a number
        raise TrainingError(f"damping must be a finite number above 0, not {damping!r}")
    return float(damping)  # type: ignore[arg-type]


def check_gradients(gradients: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> None:
    """Check that gradients are those of the parameters of a Fisher.

    Args:
        gradients: Gradients by parameter name.
        shapes: Shapes of the parameters of the Fisher.

    Raises:
        TrainingError: A gradient is missing, is not a tensor, has another shape, is not finite, or has no Fisher.
    """
    if not isinstance(gradients, Mapping):
        raise TrainingError(f"the gradients must be a mapping of tensors, not {type(gradients).__name__}")
    for name, shape in shapes.items():
        found = gradients.get(name)
        if not isinstance(found, Tensor):
            raise TrainingError(
                f"the gradient of {name!r} is {'missing' if found is None else f'a {type(found).__name__}'}",
                "give a tensor for every parameter of the Fisher",
            )
        if tuple(found.shape) != tuple(shape):
            raise TrainingError(
                f"the gradient of {name!r} has the shape {tuple(found.shape)}, and the Fisher has {tuple(shape)}",
                "use the gradients of the model of the Fisher",
            )
        if not found.is_floating_point() or not bool(torch.isfinite(found).all()):
            raise TrainingError(f"the gradient of {name!r} has entries that are not finite real numbers")
    for name in gradients:
        if name not in shapes:
            raise TrainingError(f"there is no Fisher for {name!r}", "leave out the gradients of other parameters")
