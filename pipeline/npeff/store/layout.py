"""The partition of N examples into shards, and of a shard into chunks.

A shard is a contiguous range of examples. It is one Zarr shard of every array, one item of a worker, and one completion
record.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

MIN_CHUNK_BYTES = 512 * 1024
"""Below about this size, the overhead of a chunk (its index entry, its request) exceeds the cost of its bytes."""


@dataclass(frozen=True)
class ShardPlan:
    """The partition of examples 0..N-1 into ceil(N / shard_size) contiguous ranges. Only the last may be smaller."""

    n_examples: int
    shard_size: int
    """Examples in a full shard."""

    def __post_init__(self) -> None:
        if self.n_examples < 1:
            raise ValueError(f"n_examples must be at least 1, not {self.n_examples}")
        if self.shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, not {self.shard_size}")

    @property
    def n_shards(self) -> int:
        return -(-self.n_examples // self.shard_size)

    def bounds(self, shard: int) -> tuple[int, int]:
        """Return the first example of a shard and one past its last. Raises IndexError outside 0..n_shards-1."""
        if not 0 <= shard < self.n_shards:
            raise IndexError(f"shard {shard} is outside 0..{self.n_shards - 1}")
        start = shard * self.shard_size
        return start, min(start + self.shard_size, self.n_examples)

    def __len__(self) -> int:
        return self.n_shards

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Iterate over the bounds of shard 0, 1, ..."""
        return map(self.bounds, range(self.n_shards))


def inner_chunk_examples(shard_size: int, bytes_per_example: int) -> int:
    """Return the number of examples in an inner chunk.

    It is the smallest divisor of `shard_size` for which a chunk has at least `MIN_CHUNK_BYTES`.
    Zarr requires that the size of an inner chunk divides the size of the shard. A shard that is smaller than
    `MIN_CHUNK_BYTES` is one chunk. A shard of prime size is also one chunk, unless one example is large enough.
    """
    if shard_size < 1 or bytes_per_example < 1:
        raise ValueError(f"sizes must be positive, not {shard_size} examples of {bytes_per_example} bytes")
    needed = -(-MIN_CHUNK_BYTES // bytes_per_example)
    return next((d for d in range(needed, shard_size) if shard_size % d == 0), shard_size)
