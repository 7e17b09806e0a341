"""Diagonal Fishers and other named tensors, from a mapping or from a safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from npeff.training.errors import TrainingError

Tensors = Mapping[str, Tensor] | str | os.PathLike[str]
"""Tensors by parameter name, or the path of a safetensors file with these tensors."""


@dataclass(frozen=True)
class NamedTensors:
    """Tensors by parameter name, and the texts in the header of their file."""

    values: dict[str, Tensor]
    metadata: dict[str, str]


def named_tensors(source: Tensors, what: str) -> NamedTensors:
    """Return the tensors of a mapping, or read those of a file.

    Args:
        source: A mapping, or the path of a safetensors file.
        what: The beginning of the message of an error.

    Raises:
        TrainingError: The file is missing or no safetensors file, or a value is not a tensor.
    """
    metadata: dict[str, str] = {}
    if isinstance(source, Mapping):
        values = dict(source)
    elif isinstance(source, str | os.PathLike):
        values, metadata = _read(Path(source), what)
    else:
        raise TrainingError(f"{what} must be a mapping of tensors or the path of a file, not {type(source).__name__}")
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise TrainingError(f"{what}: {name!r} must be a tensor, not {type(value).__name__}")
    return NamedTensors(values, metadata)


def check_diagonal(values: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors can be a diagonal Fisher.

    Raises:
        TrainingError: There is no tensor, or an entry is negative or not finite.
    """
    if not values:
        raise TrainingError(f"{what} is empty: give one tensor for each parameter")
    for name, value in values.items():
        if not value.is_floating_point():
            raise TrainingError(f"{what}: {name!r} must have real floating-point entries, not {value.dtype}")
        if not bool((torch.isfinite(value) & (value >= 0)).all()):
            raise TrainingError(
                f"{what}: {name!r} has entries that are negative or not finite: a diagonal Fisher has none"
            )


def check_shape(name: str, found: Tensor, expected: Tensor, what: str) -> None:
    """Check that a tensor has the shape of another one.

    Raises:
        TrainingError: The shapes differ.
    """
    if found.shape != expected.shape:
        raise TrainingError(
            f"{what}: {name!r} has the shape {tuple(found.shape)}, and the parameter has {tuple(expected.shape)}",
            "use the Fisher and the parameters of one model",
        )


def _read(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping
            return values, dict(file.metadata() or {})
    except FileNotFoundError:
        raise TrainingError(
            f"{what}: {path} does not exist", "give the path of a safetensors file", path=path
        ) from None
    except (OSError, SafetensorError):
        raise TrainingError(
            f"{what}: {path} cannot be read as a safetensors file", "give another file", path=path
        ) from None
