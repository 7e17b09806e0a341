"""The sketch: a linear map Q from parameter space to R^D, the same for every example, worker and run with its seed.

The `topk` sketch is not linear. It exists for comparison only.

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
from npeff.gradients.routed import Routed
from npeff.gradients.sums import Sum
from npeff.options.sketch import SketchSpec
from npeff.sketches.kronecker import Projection
from npeff.sketches.tensorsketch import Hashes, fourier, fourier_is_cheaper, fourier_routed, scatter, window_width

Method = Literal["auto", "fft", "scatter"]


class Sketch(Protocol):
    """A map from parameter space to R^dim."""

    @property
    def dim(self) -> int:
        """D, the number of coordinates."""

    @property
    def calibrated(self) -> bool:
        """Whether to recombine the rows of an example so that their Gram matrix is exact (`calibration.py`).

        The linear map alone preserves the Gram matrix only on average.
        """

    def apply(self, contributions: Mapping[str, Contribution], method: Method = "auto") -> Tensor:
        """Sketch the rows of a batch: (B, R, D). `method` selects the algorithm; results differ only by rounding."""

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Sketch n directions, (n, *shape) for each parameter: (n, D). Absent parameters are zero."""


def make_sketch(spec: SketchSpec, layout: ParameterLayout, seed: int) -> Sketch:
    """Construct the sketch of `spec` and `seed` for the parameters of `layout`."""
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
    """Return zeros (B, R, width) with the dtype and device of the contributions."""
    first = next(iter(contributions.values()))
    return first.new_zeros(first.n_examples, first.rank, width)


@dataclass(frozen=True)
class IdentitySketch:
    """The identity, D = P: all parameters concatenated. For small models and tests."""

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
    """Tensor sketch: maps entry (o, i) of a parameter to bucket (h_out[o] + h_in[i]) mod w of the parameter's window.

    Parameters are reshaped to shape[0] × rest. E⟨Qx, Qy⟩ = ⟨x, y⟩ over seeds.
    """

    calibrated = True

    def __init__(self, layout: ParameterLayout, dim: int, seed: int) -> None:
        self.dim = dim
        matrices = zip(layout.names, layout.matrices, strict=True)
        self._width = window_width(dim, layout.names)
        self._hashes = {name: Hashes.draw(seed, name, matrix, dim, self._width) for name, matrix in matrices}

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
        routed: list[tuple[Routed, Hashes]] = []
        for part, hashes in parts:
            transforms = method == "fft" or (
                method == "auto" and isinstance(part, Outer | Routed) and fourier_is_cheaper(part, width)
            )
            if isinstance(part, Outer) and transforms:
                reading.setdefault(part.inputs_key(), []).append((part, hashes))
            elif isinstance(part, Routed) and transforms:
                routed.append((part, hashes))
            else:
                scatter(part, hashes, out_BRD)
        if not reading and not routed:
            return
        out_BRw = parts[0][1].window(out_BRD)
        transformed_BRF = torch.fft.rfft(torch.zeros_like(out_BRw))
        for group in reading.values():
            fourier([part for part, _ in group], [hashes for _, hashes in group], transformed_BRF)
        for part, hashes in routed:
            fourier_routed(part, hashes, transformed_BRF)
        out_BRw += torch.fft.irfft(transformed_BRF, n=width)

    def apply_dense(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return self.apply(_vectors_as_rows(vectors), "scatter")[:, 0]


class KroneckerSketch:
    """Projects each parameter from both sides to at most size × size coordinates, and concatenates the results.

    Parameters are reshaped to shape[0] × rest. E⟨Qx, Qy⟩ = ⟨x, y⟩ over seeds.
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
    """Keeps the `size` entries of largest magnitude over all rows of an example and sets all other entries to zero.

    The reference implementation of NPEFF stores Fishers in this way. D = P, because rows are stored in full, so the
    sketch is for small models. The map is not linear. Norms are computed from all entries: the norm of a stored
    normalized Fisher is therefore below 1, and the explained fraction of a factorization refers to the kept entries.
    The rows are those of A, which are already weighted. The reference uses √p_y ∇log p_y, another factor of the same
    Fisher. (Matena & Raffel, arXiv 2310.04649.)
    """

    calibrated = False  # calibration would hide the error that this sketch exists to show

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
        """Return all entries of the directions, because components also have the coordinates of the parameters."""
        return self._all.apply_dense(vectors)
