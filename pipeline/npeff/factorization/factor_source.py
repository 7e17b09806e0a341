"""Where the factors of a shard of examples come from: memory, or a store that is read again in every pass.

A source gives the same blocks in the same order each time, whichever kind it is, so that every sum over them, and all
that follows from it, has the same bits: a matrix library may round differently where shapes differ, and these do not.
Factors may be in half precision, which float32 holds exactly.

Shapes: N examples, B examples of a block, M chosen examples, R rank, D sketch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

BLOCK_ROWS = {"cpu": 4096, "cuda": 65_536}
"""Factor rows (examples × rank) of a block at most, by device: enough for the products to run at full speed."""


class FactorSource(Protocol):
    """Normalised factors Â (N, R, D) of examples, in order."""

    n_examples: int
    rank: int
    dim: int
    dtype: torch.dtype
    """As they are given out: float64, float32, or a half precision."""
    device: torch.device

    def blocks(self) -> Iterator[Tensor]:
        """Consecutive blocks (B, R, D), to be read only; B·R is at most the device's `BLOCK_ROWS` (B is 1 at least)."""
        ...

    def rows(self, indices_M: Tensor) -> Tensor:
        """The chosen examples (M, R, D)."""
        ...


class FactorsInMemory:
    """Parts (n, R, D) of one precision on one device, kept; not copied."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = list(parts)
        self.n_examples = sum(len(part) for part in self._parts)
        self.rank, self.dim = self._parts[0].shape[1:]
        self.dtype, self.device = self._parts[0].dtype, self._parts[0].device

    def blocks(self) -> Iterator[Tensor]:
        for part in self._parts:
            yield from _cut(part)

    def whole(self) -> Tensor:
        return self._parts[0] if len(self._parts) == 1 else torch.cat(self._parts)

    def rows(self, indices_M: Tensor) -> Tensor:
        if len(self._parts) == 1:
            return self._parts[0][indices_M]
        return _chosen(indices_M, [len(part) for part in self._parts], self._parts.__getitem__, self)


class StreamedFactors:
    """Parts that are read anew in every pass, the next one by a thread while the present one is in use.

    Args:
        sizes: examples of each part.
        read: gives part p (sizes[p], R, D), the same each time; called by another thread.
        rank: R.
        dim: D.
        dtype: of the parts.
        device: of the parts.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        read: Callable[[int], Tensor],
        *,
        rank: int,
        dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.n_examples, self.rank, self.dim, self.dtype, self.device = sum(sizes), rank, dim, dtype, device
        self._sizes, self._read = list(sizes), read

    def blocks(self) -> Iterator[Tensor]:
        with ThreadPoolExecutor(1, "reader") as reader:
            ahead: list[Future[Tensor]] = []
            for part in range(len(self._sizes)):
                waiting = ahead.pop() if ahead else reader.submit(self._read, part)
                now = waiting.result()
                if part + 1 < len(self._sizes):
                    ahead.append(reader.submit(self._read, part + 1))
                yield from _cut(now)

    def rows(self, indices_M: Tensor) -> Tensor:
        return _chosen(indices_M, self._sizes, self._read, self)


def _cut(part_NRD: Tensor) -> Iterator[Tensor]:
    if len(part_NRD):
        yield from part_NRD.split(max(1, BLOCK_ROWS[part_NRD.device.type] // part_NRD.shape[1]))


def _chosen(indices_M: Tensor, sizes: Sequence[int], read: Callable[[int], Tensor], like: FactorSource) -> Tensor:
    chosen = torch.empty(len(indices_M), like.rank, like.dim, dtype=like.dtype, device=like.device)
    stops = list(accumulate(sizes))
    places = [(index, bisect_right(stops, index)) for index in indices_M.tolist()]
    for part in sorted({part for _, part in places}):
        part_NRD, first = read(part), stops[part] - sizes[part]
        for place, (index, of_part) in enumerate(places):
            if of_part == part:
                chosen[place] = part_NRD[index - first]
    return chosen
