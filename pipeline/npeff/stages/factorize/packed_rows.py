"""Rows of all examples in one file for each worker, which the driver maps, so that they are never in its memory.

Worker r of s has the rows of the shards r, r + s, …, in this order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.storage.atomic import local_copy, write_file_atomically
from npeff.store.layout import ShardPlan


def write_rows(folder: Path, name: str, rank: int, size: int, rows: NDArray[Any]) -> None:
    """Write the rows of worker ``rank`` of ``size``. Raises StoreError if they cannot be written."""
    write_file_atomically(_file(folder, name, rank, size), lambda file: np.save(file, rows, allow_pickle=False))


def mapped_rows(folder: Path, name: str, size: int, plan: ShardPlan) -> list[NDArray[Any]]:
    """Return the rows of each shard. They stay readable if the files are deleted.

    Raises:
        StoreError: A file cannot be read.
    """
    found: dict[int, NDArray[Any]] = {}
    for rank in range(min(size, plan.n_shards)):
        shards = range(rank, plan.n_shards, size)
        ends = np.cumsum([stop - start for start, stop in map(plan.bounds, shards)])
        with local_copy(_file(folder, name, rank, size)) as path:
            rows = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        found |= zip(shards, np.split(rows, ends[:-1]), strict=True)
    return [found[shard] for shard in range(plan.n_shards)]


def _file(folder: Path, name: str, rank: int, size: int) -> Path:
    return folder / f"{name}-{rank:05d}-of-{size:05d}.npy"
