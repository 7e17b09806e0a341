"""The sketch: one linear map Q from parameter space to R^D, the same for every example, worker and run with its seed.

`topk`, which is not linear, has a place here for comparison only.

Legend: B batch, R rank, P parameters, D sketch, w window, F = w // 2 + 1.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

import torch
from torch import Tensor

from npeff.gradients import ParameterLayout
from npeff.gradients.contribution import Contribution, Dense, flat_blocks
from npeff.gradients.outer import Outer
from npeff.gradients.sums import Sum
from npeff.options.sketch import SketchSpec
from npeff.sketches.kronecker import Projection
from npeff.sketches.tensorsketch import Hashes, fourier, fourier_is_cheaper, scatter, window_width

Method = Literal["auto", "fft", "scatter"]


class Sketch(Protocol):
    """A map from parameter space to R^dim."""

    @property
    def dim(self) -> int:
        """D."""

    @property
    def calibrated(self) -> bool:
        """Whether the rows of an example are to be recombined so that their Gram matrix is the exact one: a linear map
        keeps it on average only."""

    def apply(self, contributions: Mapping[str, Contribution], method: Method = "auto") -> Tensor:
        """Sketched rows (B, R, D). `method` chooses how the map is computed, never its result beyond rounding."""

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """(n, D): where n directions in parameter space, (n, *shape) for each parameter, lie in the sketch; absent
        parameters are zero."""


def make_sketch(spec: SketchSpec, layout: ParameterLayout, seed: int) -> Sketch:
    """The sketch of `spec` and `seed` for parameters laid out by `layout`."""
    if spec.kind == "identity":
        return IdentitySketch(layout)
    if spec.kind == "tensorsketch":
        assert spec.dim is not None
        return TensorSketch(layout, spec.dim, seed)
    assert spec.size is not None
    if spec.kind == "kronecker":
        return KroneckerSketch(layout, spec.size, seed)
    return TopKSketch(layout, spec.size)


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
    calibrated = False

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

    calibrated = True

    def __init__(self, layout: ParameterLayout, dim: int, seed: int) -> None:
        self.dim = dim
        shapes = zip(layout.names, layout.shapes, strict=True)
        self._width = window_width(dim, layout.names)
        self._hashes = {name: Hashes.draw(seed, name, shape, dim, self._width) for name, shape in shapes}

    def apply(self, contributions: Mapping[str, Contribution], method: Method = "auto") -> Tensor:
        out_BRD = _zeros(contributions, self.dim)
        windows: dict[int, list[tuple[Contribution, Hashes]]] = {}
        for name, contribution in contributions.items():
            hashes = self._hashes[name] = self._hashes[name].to(out_BRD.device)
            parts = contribution.parts if isinstance(contribution, Sum) else (contribution,)
            windows.setdefault(hashes.start, []).extend((part, hashes) for part in parts)
        for window in windows.values():
            self._add_window(window, method, out_BRD)
        return out_BRD

    def _add_window(self, parts: Sequence[tuple[Contribution, Hashes]], method: Method, out_BRD: Tensor) -> None:
        """Add the sketch of the parameters that share a window."""
        width = self._width
        reading: dict[Hashable, list[tuple[Outer, Hashes]]] = {}
        for part, hashes in parts:
            if isinstance(part, Outer) and (method == "fft" or (method == "auto" and fourier_is_cheaper(part, width))):
                reading.setdefault(part.inputs_key(), []).append((part, hashes))
            else:
                scatter(part, hashes, out_BRD)
        if not reading:
            return
        out_BRw = parts[0][1].window(out_BRD)
        transformed_BRF = torch.fft.rfft(torch.zeros_like(out_BRw))
        for group in reading.values():
            fourier([part for part, _ in group], [hashes for _, hashes in group], transformed_BRF)
        out_BRw += torch.fft.irfft(transformed_BRF, n=width)

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return self.apply(_vectors_as_rows(vectors), "scatter")[:, 0]


class KroneckerSketch:
    """Each parameter, seen as shape[0] × rest, projected from both sides to at most size × size coordinates of its own,
    the parameters one after the other.

    E⟨Qx, Qy⟩ = ⟨x, y⟩ over seeds.
    """

    calibrated = True

    def __init__(self, layout: ParameterLayout, size: int, seed: int) -> None:
        shapes = zip(layout.names, layout.shapes, strict=True)
        self._projections = {name: Projection.draw(seed, name, shape, size) for name, shape in shapes}
        *starts, self.dim = accumulate((each.n_coordinates for each in self._projections.values()), initial=0)
        self._starts = dict(zip(layout.names, starts, strict=True))

    def apply(self, contributions: Mapping[str, Contribution], method: Method = "auto") -> Tensor:
        out_BRD = _zeros(contributions, self.dim)
        for name, contribution in contributions.items():
            projection = self._projections[name] = self._projections[name].to(out_BRD.device)
            start = self._starts[name]
            out_BRD[..., start : start + projection.n_coordinates] = projection.apply(contribution)
        return out_BRD

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return self.apply(_vectors_as_rows(vectors))[:, 0]


class TopKSketch:
    """D = P, and of all entries of an example's rows together all but the `size` largest in magnitude zero: what the
    reference implementation of NPEFF stores. Not linear; for small models, as rows are kept in full.

    Norms are those of all entries, so stored Fishers are of less than unit norm by what was left out, and the explained
    variance of a factorization is of what was kept. The rows are those of A, already weighted; the reference takes
    √p_y ∇log p_y, another factor of the same Fisher. (Matena & Raffel, arXiv 2310.04649.)
    """

    calibrated = False  # what was left out is what there is to compare

    def __init__(self, layout: ParameterLayout, size: int) -> None:
        self._all, self._size = IdentitySketch(layout), size

    @property
    def dim(self) -> int:
        return self._all.dim

    def apply(self, contributions: Mapping[str, Contribution], method: Method = "auto") -> Tensor:
        rows_BRP = self._all.apply(contributions)
        entries_Bx = rows_BRP.flatten(1)
        kept_Bk = entries_Bx.abs().topk(min(self._size, entries_Bx.shape[1]), sorted=False).indices
        return torch.zeros_like(entries_Bx).scatter_(1, kept_Bk, entries_Bx.gather(1, kept_Bk)).view_as(rows_BRP)

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """All entries: a direction is compared in full with a component, which is in the parameters' coordinates."""
        return self._all.apply_dense(vectors)
