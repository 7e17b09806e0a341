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
from npeff.factorization.evidence_scores import evidence_scores
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums


@dataclass(frozen=True)
class ShardCoefficients:
    """The optimal coefficients of a shard's examples, and their losses."""

    coefficients_NK: NDArray[np.float32]
    """(n, K); NaN rows for invalid examples."""
    evidence_NK: NDArray[np.float32]
    """(n, K); NaN rows for invalid examples."""
    losses_N: NDArray[np.float64]
    """‖F̂_i − Σ_j W_ij h_j h_jᵀ‖² (n,); 0 for invalid examples."""
    squares_N: NDArray[np.float64]
    """‖F̂_i‖² (n,); 0 for invalid examples."""


class TransformWorker:
    """Computes the coefficients and the evidence of shards for fixed components.

    Args:
        fishers: the Fisher store.
        checksums: checksum of every stored shard.
        components_KD: the components, unit rows.
        l1: the penalty of the coefficients, as in `ExampleShard.finish`.
        device: device to compute on.
    """

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
        valid_N, factors_nRD = self._read(shard)
        examples = ExampleShard(factors_nRD)
        examples.finish(self._components_KD, l1=self._l1)
        losses_N, squares_N = np.zeros(len(valid_N)), np.zeros(len(valid_N))
        losses_N[valid_N] = examples.misfits_N.cpu().numpy()
        squares_N[valid_N] = examples.fisher_squares_N.cpu().numpy()
        return ShardCoefficients(
            self._rows(valid_N, examples.coefficients_NK),
            self._rows(valid_N, examples.evidence_NK),
            losses_N,
            squares_N,
        )

    def evidence(self, shard: int) -> NDArray[np.float32]:
        """Compute only the evidence (n, K) of one shard. Raises as `transform`."""
        valid_N, factors_nRD = self._read(shard)
        return self._rows(valid_N, evidence_scores(factors_nRD, self._components_KD))

    def _read(self, shard: int) -> tuple[NDArray[np.bool_], torch.Tensor]:
        """Return the mask of the valid examples of a shard, and their factors."""
        arrays = self._store.read_shard(shard, self._checksums[shard], ("factors", "valid"))
        valid_N: NDArray[np.bool_] = arrays["valid"]
        return valid_N, torch.from_numpy(arrays["factors"][valid_N]).to(self._device)

    def _rows(self, valid_N: NDArray[np.bool_], values_nK: torch.Tensor) -> NDArray[np.float32]:
        rows_NK = np.full((len(valid_N), len(self._components_KD)), np.nan, dtype=np.float32)
        rows_NK[valid_N] = values_nK.float().cpu().numpy()
        return rows_NK
