"""Selection of the parameters that span the Fisher matrices, and their layout in a flat parameter vector."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.experts import stacks


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the selected parameters, in the order of `model.named_parameters()`."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    stacked: tuple[str, ...] = ()
    """Names of the parameters (n, rows, columns) that are stacks of matrices, such as the weights of experts."""

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Sizes of the matrix to which a sketch reshapes each parameter. A stack of n matrices has n·rows rows."""
        heads = [2 if name in self.stacked else 1 for name in self.names]
        return tuple(
            (math.prod(shape[:head]), math.prod(shape[head:])) for head, shape in zip(heads, self.shapes, strict=True)
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """P, the total number of entries of all parameters."""
        return sum(self.sizes)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First position of each parameter in a flat vector of `size` entries."""
        return tuple(accumulate(self.sizes, initial=0))[:-1]

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain lists, for a JSON attribute."""
        value = {"names": list(self.names), "shapes": [list(shape) for shape in self.shapes]}
        return value | ({"stacked": list(self.stacked)} if self.stacked else {})

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ParameterLayout:
        """Construct a layout from the output of `to_json`."""
        shapes = tuple(tuple(shape) for shape in value["shapes"])
        return cls(tuple(value["names"]), shapes, tuple(value.get("stacked", ())))


def select_parameters(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> ParameterLayout:
    """Select the floating-point parameters whose names match a pattern of `include` and no pattern of `exclude`.

    Quantized parameters are not selected. A parameter that several modules share appears once, under its first name.

    Args:
        model: The model.
        include: Shell globs of parameter names.
        exclude: Shell globs of parameter names.

    Returns:
        The layout of the selected parameters.

    Raises:
        UnsupportedModelError: A pattern of `include` matches nothing, or no parameter is selected.
    """
    unsupported = {name: _why_unsupported(value) for name, value in model.named_parameters()}
    candidates = {name: value for name, value in model.named_parameters() if unsupported[name] is None}
    if not candidates:
        raise UnsupportedModelError("the model has no floating-point parameters: gradients need at least one")
    if not include:
        raise UnsupportedModelError('parameters.include is empty: use ["*"] for all parameters')
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in candidates):
            if (matched := next((name for name in unsupported if fnmatchcase(name, pattern)), None)) is not None:
                raise UnsupportedModelError(
                    f"parameters.include: {pattern!r} matches only parameters without a gradient: {matched} "
                    f"{unsupported[matched]}"
                )
            known = ", ".join(list(candidates)[:4]) + (", …" if len(candidates) > 4 else "")
            raise UnsupportedModelError(f"parameters.include: nothing matches {pattern!r} (the model has {known})")
    chosen = {
        name: tuple(value.shape)
        for name, value in candidates.items()
        if any(fnmatchcase(name, pattern) for pattern in include)
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not chosen:
        raise UnsupportedModelError("parameters.exclude excludes every parameter: exclude fewer parameters")
    stacked = tuple(name for name in chosen if _is_stack(model, name))
    return ParameterLayout(tuple(chosen), tuple(chosen.values()), stacked)


def _is_stack(model: nn.Module, name: str) -> bool:
    holder, _, local = name.rpartition(".")
    return local in (stacks(model.get_submodule(holder)) or ())


def is_quantized(value: Tensor) -> bool:
    """Return whether the entries of a tensor are stored with at most 8 bits.

    The tensor is one of 8-bit numbers, or a tensor subclass that keeps its entries in such a tensor. torchao's report
    the type of the numbers that they stand for, such as float32.
    """
    if is_traceable_wrapper_subclass(value):
        return any(is_quantized(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return value.dtype.itemsize == 1 and value.dtype != torch.bool


def _why_unsupported(value: Tensor) -> str | None:
    """Return why gradients of a parameter cannot be computed, as the end of a sentence that begins with its name."""
    if is_quantized(value):
        return "is quantized: a quantized weight has no gradient"
    if value.is_floating_point():
        return None
    why = "Fishers of complex parameters are not supported" if value.is_complex() else "it has no gradient"
    return f"is {value.dtype}: {why}".replace("torch.", "")


@dataclass(frozen=True)
class LeftOut:
    """Why a parameter is not in the layout.

    Attributes:
        reason: The end of a sentence that begins with the parameter's name.
        unsupported: Whether gradients of the parameter cannot be computed. If False, the run file excludes it.
    """

    reason: str
    unsupported: bool


def left_out(model: nn.Module, layout: ParameterLayout, exclude: Sequence[str] = ()) -> dict[str, LeftOut]:
    """Return the parameters that are not in `layout`, each with the reason.

    A shared parameter is listed under its first name.
    """
    reasons = {}
    for name, value in model.named_parameters():
        if name in layout.names:
            continue
        pattern = next((pattern for pattern in exclude if fnmatchcase(name, pattern)), None)
        if (unsupported := _why_unsupported(value)) is not None:
            reasons[name] = LeftOut(unsupported, unsupported=True)
        elif pattern is not None:
            reasons[name] = LeftOut(f"matches {pattern!r} of parameters.exclude", unsupported=False)
        else:
            reasons[name] = LeftOut("matches nothing in parameters.include", unsupported=False)
    return reasons


@contextmanager
def in_memory(parameters: Iterable[Tensor], *, changed: bool = False) -> Iterator[None]:
    """Keep the values of parameters in memory inside the context.

    The parameters of a model that is divided among processes (`npeff.models.sharding`) have values only while a module
    that uses them is called, and inside this context. Other parameters always have values.

    Args:
        parameters: The parameters themselves, not detached ones.
        changed: Whether the values are changed inside the context.
    """
    with ExitStack() as stack:
        for parameter in parameters:
            if (holder := getattr(parameter, "holder", None)) is not None:
                stack.enter_context(holder.held(changed))
        yield


def model_fingerprint(model: nn.Module, layout: ParameterLayout) -> str:
    """Compute the SHA-256 hash of the names, shapes, dtypes and bytes of the selected parameters."""
    return fingerprint_of(dict(model.named_parameters()), layout.names)


def fingerprint_of(tensors: Mapping[str, Tensor], names: Iterable[str]) -> str:
    """Compute the fingerprint of a model from its parameters by name, in the order of `names`."""
    digest = hashlib.sha256()
    for name in names:
        value = tensors[name].detach()
        digest.update(f"{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        with in_memory([tensors[name]]):
            copied = value.flatten().clone()  # an array of the parameter itself would hold its storage forever
        digest.update(copied.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
