"""Which parameters span the Fisher matrices, and where each of them lies in a flat parameter vector."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from npeff.gradients.errors import UnsupportedModelError


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the selected parameters, in the order of `model.named_parameters()`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """P, the number of entries of all parameters together."""
        return sum(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First position of each parameter in a flat vector of `size` entries."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, for a JSON attribute."""
        return {"names": list(self.names), "shapes": [list(shape) for shape in self.shapes]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ParameterLayout:
        """The inverse of `to_json`."""
        return cls(tuple(value["names"]), tuple(tuple(shape) for shape in value["shapes"]))


def select_parameters(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> ParameterLayout:
    """Floating-point parameters whose name matches a pattern of `include` and none of `exclude` (shell globs).

    A parameter that several modules share appears once, under its first name. Raises UnsupportedModelError if a
    pattern of `include` matches nothing, or nothing is left.
    """
    candidates = {name: value for name, value in model.named_parameters() if value.is_floating_point()}
    if not candidates:
        raise UnsupportedModelError("the model has no floating-point parameters: there is nothing to take gradients of")
    if not include:
        raise UnsupportedModelError('parameters.include is empty: use ["*"] for all parameters')
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            known = ", ".join(list(candidates)[:4]) + (", …" if len(candidates) > 4 else "")
            raise UnsupportedModelError(f"parameters.include: nothing matches {pattern!r} (the model has {known})")
    chosen = {
        name: tuple(value.shape)
        for name, value in candidates.items()
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not chosen:
        raise UnsupportedModelError("parameters.exclude leaves no parameter: exclude less")
    return ParameterLayout(tuple(chosen), tuple(chosen.values()))


def left_out(model: nn.Module, layout: ParameterLayout, exclude: Sequence[str] = ()) -> dict[str, str]:
    """The parameters that are not in `layout`, and why not; a shared one is listed under its first name."""
    reasons = {}
    for name, value in model.named_parameters():
        if name in layout.names:
            continue
        pattern = next((pattern for pattern in exclude if fnmatchcase(name, pattern)), None)
        if not value.is_floating_point():
            reasons[name] = f"is {value.dtype}, which has no gradient".replace("torch.", "")
        elif pattern is not None:
            reasons[name] = f"matches {pattern!r} of parameters.exclude"
        else:
            reasons[name] = "matches nothing in parameters.include"
    return reasons


def model_fingerprint(model: nn.Module, layout: ParameterLayout) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the selected parameters: equal if and only if they are equal."""
    parameters = dict(model.named_parameters())
    digest = hashlib.sha256()
    for name in layout.names:
        value = parameters[name].detach()
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        digest.update(value.reshape(-1).contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
