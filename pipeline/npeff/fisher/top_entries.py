"""The largest entries of the diagonals of per-example Fishers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from npeff.fisher.diagonal import diagonal_blocks, looked_up, norms_of
from npeff.gradients import ParameterLayout
from npeff.gradients.contribution import Contribution
from npeff.gradients.embedding_rows import Rows


@dataclass(frozen=True)
class TopEntries:
    """The largest entries of the diagonals of a batch."""

    values_Bk: Tensor
    """Values in descending order, float64. If fewer than k entries are positive, the rest are 0 with index 0."""
    indices_Bk: Tensor
    """Positions in the flat parameter vector of the layout, int64."""
    norms_B: Tensor
    """‖f‖₂ of the whole diagonals, float64."""


@torch.no_grad()
def top_entries(
    contributions: Mapping[str, Contribution], scales_B: Tensor, layout: ParameterLayout, k: int
) -> TopEntries:
    """Find the k largest entries of each example's f, exactly, and compute the norm of f.

    The choice among equal entries is not specified.

    Args:
        contributions: Contributions by parameter name.
        scales_B: Divisors of the contributions, float64.
        layout: Layout of the parameters.
        k: Number of entries to keep.

    Returns:
        The values, the positions and the norms.

    Raises:
        ValueError: k is not from 1 to P.
    """
    if not 1 <= k <= layout.size:
        raise ValueError(f"k must be from 1 to {layout.size}, the number of parameter entries, not {k}")
    largest = [_Largest(k) for _ in scales_B]
    squares_B = torch.zeros_like(scales_B)
    offsets = dict(zip(layout.names, layout.offsets, strict=True))
    for name, part in contributions.items():
        offset = offsets[name]
        if isinstance(part, Rows):
            examples_n, rows_n, diagonal_ni = looked_up(part)
            squares_B.index_add_(0, examples_n, norms_of(diagonal_ni).square())
            columns_i = torch.arange(part.shape[1], device=rows_n.device)
            counts = torch.bincount(examples_n, minlength=part.n_examples).tolist()
            # the rows of an example are consecutive
            for found, rows, diagonal in zip(largest, rows_n.split(counts), diagonal_ni.split(counts), strict=True):
                found.add(diagonal.flatten(), offset, (rows[:, None] * part.shape[1] + columns_i).flatten())
            continue
        for start, stop, diagonal_bx in diagonal_blocks(part):
            squares_B[start:stop] += norms_of(diagonal_bx).square()
            for found, diagonal_x in zip(largest[start:stop], diagonal_bx, strict=True):
                found.add(diagonal_x, offset)
    values_Bk = scales_B.new_zeros(len(scales_B), k)
    indices_Bk = torch.zeros_like(values_Bk, dtype=torch.int64)
    for found, values_k, indices_k in zip(largest, values_Bk, indices_Bk, strict=True):
        values, indices = found.sorted()
        values_k[: len(values)] = values
        indices_k[: len(indices)] = indices
    squared_scales_B = scales_B.square()
    return TopEntries(values_Bk * squared_scales_B[:, None], indices_Bk, squares_B.sqrt() * squared_scales_B)


class _Largest:
    """Collects the k largest positive numbers of one example, holding at most about 2k numbers at a time.

    A comparison with the smallest of the current k largest numbers rejects most numbers.
    """

    def __init__(self, k: int) -> None:
        self._k, self._count = k, 0
        self._held: list[tuple[Tensor, Tensor]] = []
        self._above: Tensor | float = 0.0

    def add(self, values_x: Tensor, offset: int, places_x: Tensor | None = None) -> None:
        """Add values with the indices `offset` + 0, 1, …, or `offset` + `places_x`."""
        kept = (values_x > self._above).nonzero()[:, 0]
        places = kept if places_x is None else places_x[kept]
        self._held.append((values_x[kept], places + offset))
        self._count += len(kept)
        if self._count >= 2 * self._k:
            values, indices = self._joined()
            values, order = values.topk(self._k, sorted=False)
            self._held, self._count, self._above = [(values, indices[order])], self._k, values.min()

    def sorted(self) -> tuple[Tensor, Tensor]:
        """Return at most k values in descending order, and their indices."""
        values, indices = self._joined()
        values, order = values.topk(min(self._k, len(values)))
        return values, indices[order]

    def _joined(self) -> tuple[Tensor, Tensor]:
        values, indices = zip(*self._held, strict=True)
        return torch.cat(values), torch.cat(indices)
