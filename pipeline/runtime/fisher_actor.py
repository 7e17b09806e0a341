"""Stage 1 on a worker: compute and store the Fishers of whole shards.

While a batch is computed the next one is made ready, and while a shard is computed the one before is written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.fisher import FisherBatch, LabelSpec, PerExampleFishers, SketchSpec, make_sketch
from pipeline.runtime.model import LoadedModel, ModelSpec
from pipeline.store import CompletionRecord, FisherStore, ShardRecords
from pipeline.tasks import TaskError


class FisherWorker:
    """Computes shards. A shard is written whole, and only then recorded as complete."""

    def __init__(
        self,
        model: ModelSpec,
        labels: LabelSpec,
        sketch: SketchSpec,
        store: Path,
        records: ShardRecords,
        batch_size: int,
    ) -> None:
        self._loaded = model.load()
        self._fishers = PerExampleFishers(
            self._loaded.model,
            self._loaded.logits,
            self._loaded.layout,
            make_sketch(sketch, self._loaded.layout),
            labels,
        )
        self._store, self._records, self._batch_size = FisherStore.open(store), records, batch_size
        self._dtype = torch.float16 if self._store.store_dtype == "float16" else torch.float32
        if len(self._loaded.labels_N) != self._store.plan.n_examples:
            raise TaskError(
                f"task {model.task!r} has {len(self._loaded.labels_N)} examples here and had "
                f"{self._store.plan.n_examples} when the run began: it must have the same ones each time it is loaded"
            )

    def compute(self, shards: tuple[int, ...]) -> list[CompletionRecord]:
        """Compute, store and record some shards."""
        written: list[Future[CompletionRecord]] = []
        with ThreadPoolExecutor(1, "writer") as writer:
            for shard in shards:
                began = time.monotonic()
                arrays = self._compute(shard)
                if written:
                    written[-1].result()  # one shard waits to be written, not many; and what went wrong is told
                written.append(writer.submit(self._write, shard, arrays, began))
        return [record.result() for record in written]

    def _compute(self, shard: int) -> dict[str, np.ndarray]:
        start, stop = self._store.plan.bounds(shard)
        plan = self._loaded.batches(range(start, stop), self._batch_size)
        parts = []
        for examples, batch in ready_ahead(self._loaded, plan):
            result = self._fishers(batch, examples, self._loaded.targets(batch, examples))
            parts.append(_stored_form(result, self._dtype, "logits" in self._store.array_names))
        # from the order in which they were computed to that of the examples
        order = torch.tensor([example for examples in plan for example in examples]).argsort()
        arrays = {name: torch.cat([part[name] for part in parts]).cpu()[order].numpy() for name in parts[0]}
        return arrays | {"labels": self._loaded.labels_N[start:stop]}

    def _write(self, shard: int, arrays: dict[str, np.ndarray], began: float) -> CompletionRecord:
        start, stop = self._store.plan.bounds(shard)
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


def ready_ahead(loaded: LoadedModel, plan: Sequence[list[int]]) -> Iterator[tuple[list[int], Any]]:
    """Every batch of the plan, the next one being tokenized, collated and sent to the device meanwhile."""
    with ThreadPoolExecutor(1, "loader") as loader:
        waiting = loader.submit(loaded.batch, plan[0]) if plan else None
        for place, examples in enumerate(plan):
            assert waiting is not None
            batch = waiting.result()
            if place + 1 < len(plan):
                waiting = loader.submit(loaded.batch, plan[place + 1])
            yield examples, batch


def _stored_form(batch: FisherBatch, dtype: torch.dtype, with_logits: bool) -> dict[str, Tensor]:
    """Factors divided by √‖F‖_F: of unit size whatever the example's norm, so that half precision can hold them.

    They are rounded to it here because torch does that many times faster than numpy, to the same bits.
    """
    scale_B = torch.where(batch.frobenius_norms_B > 0, batch.frobenius_norms_B, 1.0).rsqrt()
    normalised_BRD = batch.factors_BRD * scale_B[:, None, None].to(batch.factors_BRD)
    stored = {
        "factors": normalised_BRD.to(dtype),
        "frobenius_norms": batch.frobenius_norms_B,
        "grams": batch.grams_BRR,
        "ranks": batch.ranks_B,
        "kept_trace": batch.kept_trace_B,
        "losses": batch.losses_B.float(),
        "valid": batch.valid_B,
    }
    return stored | ({"logits": batch.logits.float()} if with_logits else {})
