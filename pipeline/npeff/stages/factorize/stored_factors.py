"""A worker's low-rank Fishers from the store. They stay in memory if they fit; else they are read again in every pass.

Several small shards are read together, so that they form a full block of factor rows.

Shapes: N examples, R rank, D sketch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.execution.process_group import ProcessGroup
from npeff.factorization import BLOCK_ROWS, ExampleShard, FactorsInMemory, FactorSource, StreamedFactors
from npeff.storage.location import is_remote
from npeff.store.fisher_arrays import StoreDtype
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums

_PRECISIONS: dict[StoreDtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class ShardRows:
    """Some of the examples of a stored shard."""

    shard: int
    checksum: ShardChecksums
    rows: NDArray[np.int64]
    """Positions in the shard, ascending."""


def example_numbers(store: FisherStore, chosen: Sequence[ShardRows]) -> NDArray[np.int64]:
    """Return the numbers of these examples in the store, in the order of the shards."""
    none: NDArray[np.int64] = np.empty(0, np.int64)
    return np.concatenate([none, *(store.plan.bounds(part.shard)[0] + part.rows for part in chosen)])


class StoredFactors:
    """Reads factors into an `ExampleShard`.

    Args:
        store: the Fisher store.
        weights_N: weights of all examples of the store.
        device: device of the factors.
        memory_limit_bytes: factors that need more memory are read from the store in every pass. On an object store,
            the memory that the fitted examples leave is used to keep the shards that were read, because the other
            examples are in the same shards.
    """

    columns_D: NDArray[np.int64] | None = None

    def __init__(self, store: FisherStore, weights_N: Tensor, device: torch.device, memory_limit_bytes: int) -> None:
        self._store, self._weights_N, self.device = store, weights_N, device
        self._memory_limit_bytes = memory_limit_bytes
        self._shards = _Shards(store)

    def subsample(self, examples_M: NDArray[np.int64]) -> Tensor:
        """Read factors (M, R, D)."""
        return torch.from_numpy(self._shards.rows(examples_M)).to(self.device)

    def fitted(self, chosen: Sequence[ShardRows], peers: ProcessGroup) -> ExampleShard:
        """Read the fitted examples, which every pass needs."""
        n_bytes = fitted_bytes(self._store, chosen, self.device, self._memory_limit_bytes)
        if n_bytes is not None and is_remote(self._store.path):
            self._shards.capacity = self._memory_limit_bytes - n_bytes
        return self._shard(chosen, self._memory_limit_bytes)

    def others(self, chosen: Sequence[ShardRows]) -> ExampleShard:
        """Read other examples, which only one pass needs and which are not kept in memory."""
        return self._shard(chosen, memory_limit_bytes=0)

    def _shard(self, chosen: Sequence[ShardRows], memory_limit_bytes: int) -> ExampleShard:
        factors = stored_factors(self._store, chosen, self.device, memory_limit_bytes, self._shards)
        return ExampleShard(factors, weights_N=self._weights_N[example_numbers(self._store, chosen)])


def stored_factors(
    store: FisherStore,
    shards: Sequence[ShardRows],
    device: torch.device,
    memory_limit_bytes: int,
    source: _Shards | None = None,
) -> FactorSource:
    """Return the factors of these examples, in the order of the shards. The first read of a shard checks its checksum.

    Args:
        store: the Fisher store.
        shards: the examples.
        device: device of the factors.
        memory_limit_bytes: factors that need more memory are read in every pass.
        source: reader of the shards, which may have kept some of them.

    `kept_precision` determines whether the factors stay in memory, and in which precision.

    Raises:
        StoreError: a shard is missing or damaged. Later reads of the returned source can raise it too.
    """
    n_numbers = _n_numbers(store, shards)
    parts = _parts(shards, store.rank, BLOCK_ROWS[device.type])
    reader = _Reader(source or _Shards(store), parts, device)
    kept = kept_precision(n_numbers, store.store_dtype, device.type, memory_limit_bytes)
    if kept is None:
        sizes = [sum(len(shard.rows) for shard in part) for part in parts]
        dtype = _PRECISIONS[store.store_dtype]
        return StreamedFactors(sizes, reader.read, rank=store.rank, dim=store.dim, dtype=dtype, device=device)
    empty = torch.empty(0, store.rank, store.dim, dtype=kept, device=device)
    return FactorsInMemory([empty, *(reader.read(part).to(kept) for part in range(len(parts)))])


def _n_numbers(store: FisherStore, shards: Sequence[ShardRows]) -> int:
    return sum(len(shard.rows) for shard in shards) * store.rank * store.dim


def fitted_bytes(
    store: FisherStore, shards: Sequence[ShardRows], device: torch.device, memory_limit_bytes: int
) -> int | None:
    """Return the size in memory of the factors of these examples; None if they do not fit."""
    n_numbers = _n_numbers(store, shards)
    kept = kept_precision(n_numbers, store.store_dtype, device.type, memory_limit_bytes)
    return None if kept is None else n_numbers * kept.itemsize


def kept_precision(
    n_numbers: int, store_dtype: StoreDtype, device_type: str, memory_limit_bytes: int
) -> torch.dtype | None:
    """Return the precision in which factors are kept in memory, or None if they do not fit.

    A CPU uses float32 if the limit allows it, else the precision of the store; the results are the same. A GPU always
    uses the precision of the store, in which its products are faster.
    """
    stored = _PRECISIONS[store_dtype]
    if n_numbers * stored.itemsize > memory_limit_bytes:
        return None
    return torch.float32 if device_type == "cpu" and n_numbers * 4 <= memory_limit_bytes else stored


class _Shards:
    """Reads the factors of whole shards, in the precision of the store, and keeps as many as fit ``capacity`` bytes.

    The first read of a shard verifies its checksum.
    """

    def __init__(self, store: FisherStore) -> None:
        self.store, self.capacity = store, 0
        self._verified: set[int] = set()
        self._kept: dict[int, NDArray[np.generic]] = {}

    def read(self, wanted: ShardRows) -> NDArray[np.generic]:
        factors_NRD = self._kept.get(wanted.shard)
        if factors_NRD is None:
            checksum = None if wanted.shard in self._verified else wanted.checksum
            factors_NRD = self.store.read_factors(wanted.shard, checksum)
            self._verified.add(wanted.shard)
            if sum(each.nbytes for each in self._kept.values()) + factors_NRD.nbytes <= self.capacity:
                self._kept[wanted.shard] = factors_NRD
        return factors_NRD if len(wanted.rows) == len(factors_NRD) else factors_NRD[wanted.rows]

    def rows(self, examples_M: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the factors (M, R, D) of these examples, in float32."""
        store, size = self.store, self.store.plan.shard_size
        found_MRD = np.empty((len(examples_M), store.rank, store.dim), np.float32)
        kept_M = np.isin(examples_M // size, list(self._kept))
        found_MRD[~kept_M] = store.read_rows(examples_M[~kept_M], ["factors"])["factors"]
        for shard in np.unique(examples_M[kept_M] // size).tolist():
            places = np.flatnonzero(kept_M & (examples_M // size == shard))
            found_MRD[places] = store.decoded_factors(self._kept[shard][examples_M[places] - shard * size])
        return found_MRD


class _Reader:
    def __init__(self, shards: _Shards, parts: Sequence[Sequence[ShardRows]], device: torch.device) -> None:
        self._shards, self._parts, self._device = shards, parts, device

    def read(self, part: int) -> Tensor:
        arrays = [self._shards.read(shard) for shard in self._parts[part]]
        factors_NRD = torch.from_numpy(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))
        if self._shards.store.store_dtype == "bfloat16":
            factors_NRD = factors_NRD.view(torch.bfloat16)
        return factors_NRD.to(self._device)


def _parts(shards: Sequence[ShardRows], rank: int, block_rows: int) -> list[list[ShardRows]]:
    """Divide the shards, in order, into parts with at least a block of factor rows each (the last can be smaller)."""
    parts: list[list[ShardRows]] = []
    rows = block_rows
    for shard in shards:
        if rows >= block_rows:
            parts.append([])
            rows = 0
        parts[-1].append(shard)
        rows += len(shard.rows) * rank
    return parts
