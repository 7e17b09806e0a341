"""What the stored Fishers tell about steps along directions: traces, and predicted KL divergences.

Legend: N examples, n examples of a query, R rank, C classes, D sketch dimension, d directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.gradients import ParameterLayout, exact_label_factor, truncated_label_factor
from npeff.sketches import Sketch
from npeff.stages.earlier_results import sketch_of
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums
from npeff.verification.linearized import Linearized, orthogonal_changes, triangular_changes

_KEPT_BYTES = 2**29
"""Size in bytes, in float32, of factors that are kept in memory."""
_BLOCK_BYTES = 2**26
"""Size in bytes, in float32, of the factors that are in memory at once, if they are not kept."""


class StoredSketches:
    """The stored factors of a run.

    Args:
        path: The Fisher store.
        checksums: Checksum of every stored shard.
        layout: The parameters of the factors.
        count: Function that returns the numbers of predictions of examples. It is called if examples have several.

    Raises:
        StoreError: The store is missing or damaged. Factors that do not fit in memory are read without their checksums.
    """

    def __init__(
        self,
        path: Path,
        checksums: Mapping[int, ShardChecksums],
        layout: ParameterLayout,
        count: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    ) -> None:
        self._count = count
        self._store, self._checksums = FisherStore.open(path), checksums
        self._labels = self._store.attrs["labels"]
        self._kept: dict[str, NDArray[Any]] | None = None
        self._sketch: Sketch | None = None
        # a top-k sketch is not linear, and the rows of empirical labels do not predict KL divergences
        if self._store.attrs["sketch"]["kind"] != "topk" and self._labels["kind"] != "empirical":
            self._sketch = sketch_of(self._store.attrs, layout)

    @property
    def predict(self) -> bool:
        """Whether the stored sketches predict the effect of a step."""
        return self._sketch is not None

    @property
    def with_logits(self) -> bool:
        return "logits" in self._store.array_names

    def logits(self, examples: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the stored logits (n, C) of examples."""
        return self._read(examples, ["logits"])["logits"]

    def traces(self) -> NDArray[np.float64]:
        """Return the traces of the Fishers, (N,), exact for the stored rows. Not positive for invalid examples."""
        grams = (shard["grams"] for shard in self._shards(["grams"]))
        return np.concatenate([np.trace(grams_nRR, axis1=1, axis2=2) for grams_nRR in grams])

    def sketch(self, direction: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """Return the sketch (D,) of a direction in parameter space. It needs sketches that predict."""
        assert self._sketch is not None
        sketched_1D = self._sketch.apply_dense({name: tensor[None].float() for name, tensor in direction.items()})
        result: NDArray[np.float64] = sketched_1D[0].double().cpu().numpy()
        return result

    def effects(self, examples: NDArray[np.int64], sketches: Sequence[NDArray[np.float64]]) -> list[Linearized]:
        """Predict the effects of directions on examples, from the sketches (D,) of the directions.

        The Fisher of an example is a sum over its predictions, and the effect of a step is their mean, as that of
        `Predictions.kl`.
        """
        directions_Dd = np.stack(sketches, axis=1).astype(np.float32)
        n_at_once = max(1, len(examples))
        if not self._is_kept:
            n_at_once = max(1, _BLOCK_BYTES // (4 * self._store.rank * self._store.dim))
        parts = []
        for start in range(0, max(1, len(examples)), n_at_once):
            products_nRd, rows = self._products(examples[start : start + n_at_once], directions_Dd)
            products_nRd = products_nRd.astype(np.float64) * np.sqrt(rows["frobenius_norms"])[:, None, None]
            factors_nCR = self._label_factors(rows, products_nRd.shape[1])
            if not self.with_logits:  # which are stored if every example has one prediction
                counts_n = np.maximum(self._count(examples[start : start + n_at_once]), 1)
                products_nRd /= np.sqrt(counts_n)[:, None, None]
            parts.append([self._linearized(each_nR, rows, factors_nCR) for each_nR in np.moveaxis(products_nRd, 2, 0)])
        return [_joined(each) for each in zip(*parts, strict=True)]

    def _products(
        self, examples: NDArray[np.int64], directions_Dd: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
        """Return the products of the normalized factors with directions (n, R, d), and other arrays of the examples."""
        names = ["frobenius_norms", *(["logits"] if self.with_logits else [])]
        if self._is_kept:
            factors_NRD = self._read_all()["factors"]
            # a copy of the rows of the examples would take longer than the products of all examples
            return _product(factors_NRD, directions_Dd)[examples], self._read(examples, names)
        rows = self._store.read_rows(examples, ["factors", *names])
        return _product(rows["factors"], directions_Dd), rows

    @property
    def _is_kept(self) -> bool:
        return 4 * self._store.plan.n_examples * self._store.rank * self._store.dim <= _KEPT_BYTES

    def _read(self, examples: NDArray[np.int64], names: list[str]) -> dict[str, NDArray[Any]]:
        """Read arrays of examples. All arrays are kept in memory if the factors are small."""
        if not self._is_kept:
            return self._store.read_rows(examples, names)
        kept = self._read_all()
        return {name: kept[name][examples] for name in names}

    def _read_all(self) -> dict[str, NDArray[Any]]:
        if self._kept is None:
            wanted = ["factors", "frobenius_norms", *(["logits"] if self.with_logits else [])]
            kept: dict[str, NDArray[Any]] = {}
            for (start, stop), shard in zip(self._store.plan, self._shards(wanted), strict=True):
                for name, values in shard.items():
                    if name not in kept:
                        kept[name] = np.empty((self._store.plan.n_examples, *values.shape[1:]), values.dtype)
                    kept[name][start:stop] = values
            self._kept = kept
        return self._kept

    def _shards(self, names: list[str]) -> Iterator[dict[str, NDArray[Any]]]:
        """Read arrays of every shard, and verify their checksums."""
        for shard in range(self._store.plan.n_shards):
            yield self._store.read_shard(shard, self._checksums[shard], names)

    def _label_factors(self, rows: Mapping[str, NDArray[Any]], rank: int) -> NDArray[np.float64] | None:
        """Return the factors L (n, C, R) of the labels; None if they are not known."""
        kind = self._labels["kind"]
        if "logits" not in rows or kind not in ("exact", "truncated"):
            return None
        logits_nC = torch.from_numpy(rows["logits"])
        if kind == "exact":
            return exact_label_factor(logits_nC).numpy()
        return truncated_label_factor(logits_nC, rank, self._labels["kept_trace"])[0].numpy()

    def _linearized(
        self,
        products_nR: NDArray[np.float64],
        rows: Mapping[str, NDArray[np.float64]],
        factors_nCR: NDArray[np.float64] | None,
    ) -> Linearized:
        evidence_n = np.square(products_nR).sum(axis=1)
        if factors_nCR is None:
            return Linearized(evidence_n)
        changes = triangular_changes if self._labels["kind"] == "exact" else orthogonal_changes
        return Linearized(evidence_n, rows["logits"].astype(np.float64), changes(products_nR, factors_nCR))


def _product(factors_nRD: NDArray[np.float32], directions_Dd: NDArray[np.float32]) -> NDArray[np.float32]:
    found: NDArray[np.float32] = factors_nRD.reshape(-1, factors_nRD.shape[2]) @ directions_Dd
    return found.reshape(*factors_nRD.shape[:2], -1)


def _joined(parts: Sequence[Linearized]) -> Linearized:
    evidence_n = np.concatenate([part.evidence_n for part in parts])
    logits = [part.logits_nC for part in parts if part.logits_nC is not None]
    changes = [part.changes_nC for part in parts if part.changes_nC is not None]
    return Linearized(evidence_n, np.concatenate(logits), np.concatenate(changes)) if logits else Linearized(evidence_n)
