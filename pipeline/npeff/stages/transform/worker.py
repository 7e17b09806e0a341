"""The worker of the stage `transform`: coefficients for given components, with one stored shard in memory at a time.

Shapes: n examples of a shard, K components, D sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.factorization import ExampleShard
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums


@dataclass(frozen=True)
class ShardCoefficients:
    """The optimal coefficients of a shard's examples, and their loss."""

    coefficients_NK: NDArray[np.float32]
    """(n, K); NaN rows for invalid examples."""
    loss: float
    fisher_square_sum: float


class TransformWorker:
    """Computes the coefficients of shards for fixed components."""

    def __init__(
        self,
        fishers: Path,
        checksums: dict[int, ShardChecksums],
        components_KD: NDArray[np.float64],
        l1: float,
        device: str,
    ) -> None:
        self._store, self._checksums, self._l1 = FisherStore.open(fishers), checksums, l1
        self._device = torch.device(device)
        self._components_KD = torch.from_numpy(components_KD.copy()).to(self._device)

    def transform(self, shard: int) -> ShardCoefficients:
        """Compute the coefficients of one shard.

        Raises:
            StoreError: the shard is missing or damaged.
        """
        arrays = self._store.read_shard(shard, self._checksums[shard], ("factors", "valid"))
        valid = np.flatnonzero(arrays["valid"])
        examples = ExampleShard(torch.from_numpy(arrays["factors"][valid]).to(self._device))
        statistics = examples.finish(self._components_KD, l1=self._l1)
        rows_NK = np.full((len(arrays["valid"]), len(self._components_KD)), np.nan, dtype=np.float32)
        rows_NK[valid] = examples.coefficients_NK.float().cpu().numpy()
        return ShardCoefficients(rows_NK, statistics.loss(self._components_KD), statistics.fisher_square_sum)
