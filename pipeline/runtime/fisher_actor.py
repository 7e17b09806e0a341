"""Stage 1 on a worker: compute and store the Fishers of whole shards."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.fisher import FisherBatch, PerExampleFishers, SketchSpec, make_sketch
from pipeline.runtime.model import ModelSpec
from pipeline.store import CompletionRecord, FisherStore, ShardRecords
from pipeline.tasks import TaskError


class FisherWorker:
    """Computes shards. A shard is written whole, and only then recorded as complete."""

    def __init__(
        self, model: ModelSpec, sketch: SketchSpec, store: Path, records: ShardRecords, batch_size: int
    ) -> None:
        self._loaded = model.load()
        self._fishers = PerExampleFishers(
            self._loaded.model, self._loaded.logits, self._loaded.layout, make_sketch(sketch, self._loaded.layout)
        )
        self._store, self._records, self._batch_size = FisherStore.open(store), records, batch_size
        self._dtype = torch.float16 if self._store.store_dtype == "float16" else torch.float32
        labels = self._loaded.table()["label"].cast(pa.int64()).fill_null(-1)
        if len(labels) != self._store.plan.n_examples:
            raise TaskError(
                f"task {model.task!r} has {len(labels)} examples here and had {self._store.plan.n_examples} when the "
                "run began: it must have the same ones each time it is loaded"
            )
        self._labels_N = labels.to_numpy()

    def compute(self, shard: int) -> CompletionRecord:
        """Compute, store and record one shard."""
        began = time.monotonic()
        start, stop = self._store.plan.bounds(shard)
        batches = []
        for first in range(start, stop, self._batch_size):
            indices = range(first, min(first + self._batch_size, stop))
            batches.append(_stored_form(self._fishers(self._loaded.batch(indices), len(indices)), self._dtype))
        arrays: dict[str, Any] = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        arrays["labels"] = self._labels_N[start:stop]
        record = CompletionRecord(
            shard=shard,
            start=start,
            stop=stop,
            checksum=self._store.write_shard(shard, arrays),
            n_invalid=int((~arrays["valid"]).sum()),
            seconds=time.monotonic() - began,
            signature=self._records.signature,
        )
        self._records.write(record)
        return record


def _stored_form(batch: FisherBatch, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Factors divided by √‖F‖_F: of unit size whatever the example's norm, so that half precision can hold them.

    They are rounded to it here because torch does that many times faster than numpy, to the same bits.
    """
    scale_B = torch.where(batch.frobenius_norms_B > 0, batch.frobenius_norms_B, 1.0).rsqrt()
    normalised_BRD = batch.factors_BRD * scale_B[:, None, None].to(batch.factors_BRD)
    return {
        "factors": normalised_BRD.to(dtype).cpu().numpy(),
        "frobenius_norms": batch.frobenius_norms_B.cpu().numpy(),
        "grams": batch.grams_BRR.cpu().numpy(),
        "ranks": batch.ranks_B.cpu().numpy(),
        "logits": batch.logits_BC.float().cpu().numpy(),
        "valid": batch.valid_B.cpu().numpy(),
    }
