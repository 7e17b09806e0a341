"""Checks of the inputs that a task gives for a batch.

Legend: B examples, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npeff.tasks import Inputs

_TOLERANCE = 1e-3
"""Largest difference between the two ways to the logits, relative to their largest absolute value."""


def problem_of_inputs(inputs: Inputs, n_examples: int | None) -> str | None:
    """Return what is wrong with inputs, as the end of a sentence that begins with "inputs()"; None if nothing is.

    Args:
        inputs: What the task returned.
        n_examples: Number of examples of the batch, if known.
    """
    values = inputs.values
    if not isinstance(values, Tensor) or not values.is_floating_point():
        kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
        return f"must return values as a floating-point tensor, not {kind}"
    if values.dim() < 2 or (n_examples is not None and len(values) != n_examples):
        here = "" if n_examples is None else f", here {n_examples},"
        return f"must return values whose first axis is the examples{here} and not of shape {tuple(values.shape)}"
    if not callable(inputs.logits):
        return f"must return logits as a function of the values, not {type(inputs.logits).__name__}"
    if problem := _problem_of_positions(inputs):
        return problem
    if not isinstance(inputs.exchangeable, bool):
        return f"must return exchangeable as True or False, not {inputs.exchangeable!r}"
    n_positions = _n_positions(inputs)
    for name in ("mask", "present"):
        if problem := _problem_of_mask(name, getattr(inputs, name), (len(values), n_positions)):
            return problem
    if inputs.mask is not None and inputs.present is not None and (inputs.mask & ~inputs.present).any():
        return "must return a mask that is False wherever present is False"
    return _problem_of_names(inputs, n_positions) or _problem_of_groups(inputs, (len(values), n_positions))


def problem_of_logits(values: Tensor, found: Tensor, expected: Tensor) -> str | None:
    """Return what is wrong with the logits at the values of a batch; None if they are those of the task, up to
    rounding, and a differentiable function of the values.

    Logits that are not finite are not compared: the tokens that a model excludes have the logit -inf.
    """
    if found.shape != expected.shape:
        return f"have the shape {tuple(found.shape)}, not {tuple(expected.shape)} as those of logits()"
    if not found.requires_grad or torch.autograd.grad(found.sum(), values, allow_unused=True)[0] is None:
        return (
            "do not depend on the values by differentiable operations: compute them from the values, without detach()"
        )
    finite = expected.isfinite()
    reference, difference = expected[finite].double(), (found.detach()[finite].double() - expected[finite].double())
    scale = float(reference.abs().max()) if len(reference) else 0.0
    error = float(difference.abs().max()) if len(reference) else 0.0
    if not error <= _TOLERANCE * scale:
        return (
            f"differ from those of logits() by {error:.3g}, which is more than rounding (the largest logit is "
            f"{scale:.3g}): the function must compute the same from the values of the batch"
        )
    return None


def _n_positions(inputs: Inputs) -> int:
    shape = inputs.values.shape
    return math.prod(shape[1:] if inputs.positions is None else [shape[axis] for axis in inputs.positions])


def _problem_of_positions(inputs: Inputs) -> str | None:
    axes, n_axes = inputs.positions, inputs.values.dim()
    if axes is None:
        return None
    fit = isinstance(axes, list | tuple) and all(type(axis) is int and 0 < axis < n_axes for axis in axes)
    if not fit or len(set(axes)) < len(axes):
        return (
            f"must return positions as different axes of the values from 1 to {n_axes - 1}, not {axes!r}: axis 0 is "
            "the examples"
        )
    return None


def _problem_of_mask(name: str, mask: Any, shape: tuple[int, int]) -> str | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        return f"must return {name} as a tensor of bool, not {kind}"
    if mask.shape != shape:
        return f"must return {name} as (examples, positions) {shape}, not {tuple(mask.shape)}"
    return None


def _problem_of_names(inputs: Inputs, n_positions: int) -> str | None:
    for kind, names in (("names", inputs.names), ("groups", inputs.groups)):
        if (
            isinstance(names, str)
            or not isinstance(names, Sequence)
            or not all(isinstance(name, str) for name in names)
        ):
            return f"must return {kind} as a list of strings, not {names!r}"
    if inputs.names and len(inputs.names) != n_positions:
        return f"must return one name for each of the {n_positions} positions, not {len(inputs.names)}"
    return None


def _problem_of_groups(inputs: Inputs, shape: tuple[int, int]) -> str | None:
    groups, group_of = inputs.groups, inputs.group_of
    if len(set(groups)) < len(groups):
        return f"must return groups with different names, not {list(groups)!r}"
    if group_of is None:
        return "must return group_of, the number of the group of each position, for its groups" if groups else None
    if not isinstance(group_of, Tensor) or group_of.dtype != torch.int64:
        kind = group_of.dtype if isinstance(group_of, Tensor) else type(group_of).__name__
        return f"must return group_of as a tensor of int64, not {kind}"
    if group_of.shape not in (shape, shape[1:]):
        expected = f"(positions,) {shape[1:]} or (examples, positions) {shape}"
        return f"must return group_of as {expected}, not {tuple(group_of.shape)}"
    if group_of.numel() and not (int(group_of.min()) >= -1 and int(group_of.max()) < len(groups)):
        return (
            f"must return group numbers from 0 to {len(groups) - 1}, the number of its groups less one, or -1 for no "
            f"group, not {int(group_of.min())} to {int(group_of.max())}"
        )
    return None
