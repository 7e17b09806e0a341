"""Sources of the factors of a shard of examples: memory, or a store that is read in every pass.

All sources return the same blocks in the same order in every pass. A matrix library may round differently for different
shapes; with equal blocks, every sum over the blocks is bitwise the same. Factors may be in half precision, which is
exactly representable in float32.

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
"""Maximum factor rows (examples × rank) of a block, by device: large enough for the full speed of the products."""


class FactorSource(Protocol):
    """Normalized factors Â (N, R, D) of examples, in order."""

    n_examples: int
    rank: int
    dim: int
    dtype: torch.dtype
    """Precision of the returned factors: float64, float32, or a half precision."""
    device: torch.device

    def blocks(self) -> Iterator[Tensor]:
        """Yield consecutive blocks (B, R, D), read-only. B·R is at most the device's `BLOCK_ROWS`, unless B is 1."""
        ...

    def rows(self, indices_M: Tensor) -> Tensor:
        """Return the factors (M, R, D) of the chosen examples."""
        ...


class FactorsInMemory:
    """Factors in memory: parts (n, R, D) of one precision on one device, which are not copied."""

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
    """Factors that are read in every pass, part by part. A thread reads the next part during the current one.

    Args:
        sizes: number of examples of each part.
        read: returns part p (sizes[p], R, D). Every call must return the same numbers. It is called in another thread.
        rank: R.
        dim: D.
        dtype: precision of the parts.
        device: device of the parts.
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
