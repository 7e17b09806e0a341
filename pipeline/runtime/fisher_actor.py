"""Stage 1 on a worker: look at the task, then compute and store the Fishers of whole shards."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.fisher import (
    FisherBatch,
    ParameterLayout,
    PerExampleFishers,
    SketchSpec,
    check_coverage,
    make_sketch,
    model_fingerprint,
)
from pipeline.runtime.model import ModelSpec
from pipeline.store import CompletionRecord, FisherStore, ShardRecords
from pipeline.tasks import TaskError, load_task

_COVERAGE_EXAMPLES = 2


@dataclass(frozen=True)
class TaskFacts:
    """What the driver must know of a task before it can lay out a store."""

    n_classes: int
    class_names: tuple[str, ...]
    examples: pa.Table
    layout: ParameterLayout
    sketch_dim: int
    model_fingerprint: str


class TaskWorker:
    """Prepares a task and looks at it."""

    def __init__(self, model: ModelSpec) -> None:
        self._spec = model

    def inspect(self, sketch: SketchSpec) -> TaskFacts:
        """Prepare the task, load it, and check everything that can be checked before the first shard.

        Raises:
            TaskError: the data set is empty, or logits and class names do not fit.
            UnsupportedModelError: a selected parameter's gradients cannot be had.
        """
        self._spec.cache.mkdir(parents=True, exist_ok=True)
        load_task(self._spec.task, self._spec.options).prepare(self._spec.cache)
        loaded = self._spec.load()
        n_examples = len(loaded.examples)
        if n_examples == 0:
            raise TaskError(f"task {self._spec.task!r} has no examples: there is nothing to compute Fishers of")
        table = loaded.examples.table()
        if len(table) != n_examples or not {"id", "label"} <= set(table.column_names):
            raise TaskError(f"the examples' table must have {n_examples} rows with columns id and label")
        probe = list(range(min(_COVERAGE_EXAMPLES, n_examples)))
        logits = loaded.predict(probe, batch_size=len(probe))
        class_names = tuple(loaded.examples.class_names)
        if logits.shape[1] < 2 or logits.shape[1] != len(class_names):
            raise TaskError(
                f"the model has {logits.shape[1]} logits for {len(class_names)} class names: there must be as many "
                "names as logits, and at least two"
            )
        check_coverage(loaded.model, loaded.logits, loaded.batch(probe), loaded.layout)
        return TaskFacts(
            n_classes=logits.shape[1],
            class_names=class_names,
            examples=table,
            layout=loaded.layout,
            sketch_dim=make_sketch(sketch, loaded.layout).dim,
            model_fingerprint=model_fingerprint(loaded.model, loaded.layout),
        )


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
        labels = self._loaded.examples.table()["label"].fill_null(-1)
        self._labels_N = labels.to_numpy().astype(np.int64)

    def compute(self, shard: int) -> CompletionRecord:
        """Compute, store and record one shard."""
        began = time.monotonic()
        start, stop = self._store.plan.bounds(shard)
        batches = []
        for first in range(start, stop, self._batch_size):
            indices = range(first, min(first + self._batch_size, stop))
            batches.append(_stored_form(self._fishers(self._loaded.batch(indices), len(indices))))
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


def _stored_form(batch: FisherBatch) -> dict[str, np.ndarray]:
    """Factors divided by √‖F‖_F: of unit size whatever the example's norm, so that half precision can hold them."""
    scale_B = torch.where(batch.frobenius_norms_B > 0, batch.frobenius_norms_B, 1.0).rsqrt()
    normalised_BRD = batch.factors_BRD * scale_B[:, None, None].to(batch.factors_BRD)
    return {
        "factors": normalised_BRD.float().cpu().numpy(),
        "frobenius_norms": batch.frobenius_norms_B.cpu().numpy(),
        "grams": batch.grams_BRR.cpu().numpy(),
        "ranks": batch.ranks_B.cpu().numpy(),
        "logits": batch.logits_BC.float().cpu().numpy(),
        "valid": batch.valid_B.cpu().numpy(),
    }
