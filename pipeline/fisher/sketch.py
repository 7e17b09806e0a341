"""The sketch: one linear map Q from parameter space to R^D, the same for every example, worker and run with its seed.

Legend: B batch, R rank, P parameters, D sketch, w window, F = w // 2 + 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from pipeline.fisher.contributions import Contribution, Dense, Outer, Sum, flat_blocks
from pipeline.fisher.parameters import ParameterLayout
from pipeline.fisher.tensorsketch import Hashes, fourier, fourier_is_cheaper, scatter, window_width

Method = Literal["auto", "fft", "scatter"]


@dataclass(frozen=True)
class SketchSpec:
    """What, together with the names and shapes of the parameters, determines the map."""

    kind: Literal["identity", "tensorsketch"]
    dim: int | None
    """D; None for the identity, whose D is P."""
    seed: int

    def __post_init__(self) -> None:
        if self.kind not in ("identity", "tensorsketch"):
            raise ValueError(f"sketch.kind must be identity or tensorsketch, not {self.kind!r}")
        if self.kind == "tensorsketch" and (self.dim is None or self.dim < 1):
            raise ValueError(f"sketch.dim must be a positive number of dimensions, not {self.dim!r}")
        if self.kind == "identity" and self.dim is not None:
            raise ValueError("sketch.dim must be left out for the identity sketch: it is the number of parameters")

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; `SketchSpec(**value)` is the inverse."""
        return asdict(self)


class Sketch(Protocol):
    """A linear map from parameter space to R^dim."""

    @property
    def dim(self) -> int:
        """D."""

    @property
    def exact(self) -> bool:
        """Whether inner products are kept as they are."""

    def apply(self, contributions: Mapping[str, Contribution], method: Method = "auto") -> Tensor:
        """Sketched rows (B, R, D). `method` chooses how the map is computed, never its result beyond rounding."""

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """(n, D): the map of n vectors given parameter by parameter, (n, *shape) each; absent ones are zero."""


def make_sketch(spec: SketchSpec, layout: ParameterLayout) -> Sketch:
    """The sketch of `spec` for parameters laid out by `layout`."""
    if spec.kind == "identity":
        return IdentitySketch(layout)
    assert spec.dim is not None
    return TensorSketch(layout, spec.dim, spec.seed)


def _vectors_as_rows(vectors: Mapping[str, Tensor]) -> dict[str, Contribution]:
    return {name: Dense(value[:, None]) for name, value in vectors.items()}


def _zeros(contributions: Mapping[str, Contribution], width: int) -> Tensor:
    """(B, R, width)"""
    first = next(iter(contributions.values()))
    return first.new_zeros(first.n_examples, first.rank, width)


@dataclass(frozen=True)
class IdentitySketch:
    """D = P: the parameters one after the other, for small models and tests."""

    layout: ParameterLayout
    exact = True

    @property
    def dim(self) -> int:
        return self.layout.size

    def apply(self, contributions: Mapping[str, Contribution], method: Method = "auto") -> Tensor:
        out_BRD = _zeros(contributions, self.dim)
        for name, offset, size in zip(self.layout.names, self.layout.offsets, self.layout.sizes, strict=True):
            if name in contributions:
                for start, stop, rows in flat_blocks(contributions[name]):
                    out_BRD[start:stop, :, offset : offset + size] = rows
        return out_BRD

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return self.apply(_vectors_as_rows(vectors))[:, 0]


class TensorSketch:
    """Entry (o, i) of each parameter, seen as shape[0] × rest, to bucket (h_out[o] + h_in[i]) mod w of its window.

    E⟨Qx, Qy⟩ = ⟨x, y⟩ over seeds.
    """

    exact = False

    def __init__(self, layout: ParameterLayout, dim: int, seed: int) -> None:
        self.dim = dim
        shapes = zip(layout.names, layout.shapes, strict=True)
        self._hashes = {name: Hashes.draw(seed, name, shape, dim) for name, shape in shapes}

    def apply(self, contributions: Mapping[str, Contribution], method: Method = "auto") -> Tensor:
        out_BRD = _zeros(contributions, self.dim)
        width = window_width(self.dim)
        transforms: dict[int, Tensor] = {}
        parts: list[tuple[Contribution, Hashes]] = []
        for name, contribution in contributions.items():
            hashes = self._hashes[name] = self._hashes[name].to(out_BRD.device)
            parts += [(p, hashes) for p in (contribution.parts if isinstance(contribution, Sum) else (contribution,))]
        reading: dict[tuple[Hashable, int], list[tuple[Outer, Hashes]]] = {}
        for part, hashes in parts:
            if isinstance(part, Outer) and (method == "fft" or (method == "auto" and fourier_is_cheaper(part, width))):
                reading.setdefault((part.inputs_key(), hashes.start), []).append((part, hashes))
            else:
                scatter(part, hashes, out_BRD)
        for (_, start), group in reading.items():
            if start not in transforms:
                transforms[start] = torch.fft.rfft(torch.zeros_like(out_BRD[..., :width]))
            fourier([part for part, _ in group], [hashes for _, hashes in group], transforms[start])
        for start, out_BRF in transforms.items():
            out_BRD[..., start : start + width] += torch.fft.irfft(out_BRF, n=width)
        return out_BRD

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return self.apply(_vectors_as_rows(vectors), "scatter")[:, 0]
