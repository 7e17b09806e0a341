"""Diagonal Fishers and other named tensors, from a mapping or from a safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
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


@dataclass
class Diagonal:
    """A diagonal Fisher, with the kind of its labels and the fingerprint of the model if they are known."""

    values: dict[str, Tensor]
    labels: str | None = None
    fingerprint: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in self.values.items()}

    def quadratic(self, change: Mapping[str, Tensor]) -> Tensor:
        """Return Σ_k F_k Δ_k² for a change Δ of the parameters, a scalar with a gradient."""
        total: Tensor | None = None
        for name, value in change.items():
            self.values[name] = self.values[name].to(value.device)  # moved once, not in every step
            term = (self.values[name].to(value) * value.square()).sum()
            total = term if total is None else total + term.to(total.device)
        assert total is not None, "a Fisher has at least one parameter"
        return total

    @classmethod
    def sum_of(cls, fishers: Sequence[tuple[Diagonal, float]]) -> Diagonal:
        """Return the sum of diagonal Fishers with factors, in float32 at least."""
        total: dict[str, Tensor] = {}
        for fisher, factor in fishers:
            for name, values in fisher.values.items():
                values = factor * values.to(torch.promote_types(values.dtype, torch.float32))
                total[name] = total[name] + values.to(total[name]) if name in total else values
        return cls(total)


def diagonal_of(found: NamedTensors, what: str) -> Diagonal:
    """Return the diagonal Fisher with these tensors, which are copied.

    Raises:
        TrainingError: As in `check_diagonal`.
    """
    check_diagonal(found.values, what)
    own = {name: values.detach().clone() for name, values in found.values.items()}
    return Diagonal(own, found.metadata.get("labels"), found.metadata.get("model_fingerprint"))


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


def check_shape(name: str, shape: tuple[int, ...], expected: Tensor, what: str) -> None:
    """Check that a shape is that of a parameter.

    Raises:
        TrainingError: The shapes differ.
    """
    if shape != tuple(expected.shape):
        raise TrainingError(
            f"{what}: {name!r} has the shape {shape}, and the parameter has {tuple(expected.shape)}",
            "use the Fisher and the parameters of one model",
        )


def _read(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping
            metadata = dict(file.metadata() or {})
    except FileNotFoundError:
        raise TrainingError(
            f"{what}: {path} does not exist", "give the path of a safetensors file", path=path
        ) from None
    except (OSError, SafetensorError):
        raise TrainingError(
            f"{what}: {path} cannot be read as a safetensors file", "give another file", path=path
        ) from None
    if metadata.get("checksum") not in (None, _checksum(values)):
        raise TrainingError(
            f"{what}: {path} is damaged: it does not match its checksum",
            f"run `npeff check --recompute {path.parent}` if the file is that of a run",
            path=path,
        )
    return values, metadata


def _checksum(values: Mapping[str, Tensor]) -> str:
    """Return the checksum that a run stores in its files: of the name, dtype, shape and bytes of every array."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(values):
        array = values[name].contiguous()
        dtype = array.numpy().dtype.str if array.dtype != torch.bfloat16 else "bfloat16"
        digest.update(json.dumps([name, dtype, list(array.shape)]).encode())
        digest.update(array.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
