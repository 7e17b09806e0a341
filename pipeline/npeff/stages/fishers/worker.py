"""The worker of the stage `fishers`: compute and store the Fishers of whole shards.

The worker computes a shard while it writes the previous one.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from npeff.execution.team import Team, current_team
from npeff.fisher import (
    FisherBatch,
    GroupLayout,
    PerExampleFishers,
    diagonal_norms,
    diagonal_sum,
    grouped_sums,
    top_entries,
)
from npeff.gradients import Collected, LabelSpec
from npeff.models.loaded import ModelSpec
from npeff.models.streams import Streams
from npeff.sketches import SketchSpec, make_sketch
from npeff.store.diagonal_store import DiagonalSums
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import CompletionRecord, ShardRecords
from npeff.tasks import TaskError


class FisherWorker:
    """Computes shards. A shard is recorded as complete after all its arrays are written.

    If the worker has several processes, with `spread`, each of them computes some of the batches of a shard, and the
    first one writes all of them. The batches, and so the results, are those of a single process.
    """

    def __init__(
        self,
        model: ModelSpec,
        labels: LabelSpec,
        sketch: SketchSpec,
        seed: int,
        store: Path,
        records: ShardRecords,
        batch_size: int,
        sums: DiagonalSums | None = None,
        spread: bool = False,
    ) -> None:
        self._team = current_team() if spread else None
        self._loaded = model.load()
        linear_map = make_sketch(sketch, self._loaded.layout, seed)
        loaded = self._loaded
        fishers = PerExampleFishers(loaded.model, loaded.logits, loaded.layout, linear_map, labels, loaded.one)
        self._streams = Streams(self._loaded, fishers)
        self._groups = GroupLayout.of(self._loaded.model, self._loaded.layout)
        self._store, self._records, self._batch_size = FisherStore.open(store), records, batch_size
        self._sums = sums
        self._dtype = torch.float16 if self._store.store_dtype == "float16" else torch.float32
        if len(self._loaded.labels_N) != self._store.plan.n_examples:
            raise TaskError(
                f"task {model.task!r} has {len(self._loaded.labels_N)} examples on this worker, but had "
                f"{self._store.plan.n_examples} when the run began: return the same examples each time the task is "
                "loaded"
            )

    @property
    def device(self) -> torch.device:
        return self._loaded.device

    @property
    def shard_size(self) -> int:
        return self._store.plan.shard_size

    @property
    def n_shards(self) -> int:
        return self._store.plan.n_shards

    def compute(self, shards: tuple[int, ...]) -> list[CompletionRecord]:
        """Compute, store and record shards. Returns their records."""
        return self._compute_all(shards, None)

    def compute_unit(self, unit: int) -> list[CompletionRecord]:
        """Compute, store and record the shards of a unit, and store the sum of their diagonal Fishers."""
        assert self._sums is not None
        names_and_shapes = zip(self._loaded.layout.names, self._loaded.layout.shapes, strict=True)
        total = {
            name: torch.zeros(1, *shape, dtype=torch.float64, device=self._loaded.device)
            for name, shape in names_and_shapes
        }
        records = self._compute_all(self._sums.shards(unit), total)
        if self._team is not None:
            total = {name: self._team.total(values) for name, values in total.items()}
            if self._team.rank:
                return []
        self._sums.write(unit, {name: values[0].cpu().numpy() for name, values in total.items()})
        return records

    def _compute_all(self, shards: tuple[int, ...], total: dict[str, Tensor] | None) -> list[CompletionRecord]:
        """Compute shards, and add their diagonals to ``total`` in the order of the shards and their batches."""
        written: list[Future[CompletionRecord]] = []
        with ThreadPoolExecutor(1, "writer") as writer:
            for shard in shards:
                began = time.monotonic()
                arrays = self._compute(shard, total)
                if written:
                    written[-1].result()  # at most one shard waits to be written; raises its error, if any
                if arrays is not None:
                    written.append(writer.submit(self._write, shard, arrays, began))
        return [record.result() for record in written]

    def _compute(self, shard: int, total: dict[str, Tensor] | None) -> dict[str, np.ndarray] | None:
        """Return the arrays of a shard, or None if another process writes them."""
        start, stop = self._store.plan.bounds(shard)
        plan = self._loaded.batches(range(start, stop), self._batch_size)
        own = plan if self._team is None else plan[self._team.rank :: self._team.size]
        parts = []
        for stored, collected in self._streams.map(partial(self._compute_batch, keep=total is not None), own):
            parts.append(stored)
            if total is not None and collected is not None:
                diagonal_sum(collected.contributions, collected.labels.scales_B, stored["valid"][None], total)
            del collected  # free its rows before the next batch is computed
        if self._team is not None:
            parts = _joined(self._team, parts, len(plan))
            if not parts:
                return None
        # from the order of computation to the order of the examples
        order = torch.tensor([example for examples in plan for example in examples]).argsort()
        arrays = {name: torch.cat([part[name] for part in parts]).cpu()[order].numpy() for name in parts[0]}
        return arrays | {"labels": self._loaded.labels_N[start:stop]}

    def _compute_batch(
        self, fishers: PerExampleFishers, batch: Any, examples: list[int], *, keep: bool
    ) -> tuple[dict[str, Tensor], Collected | None]:
        """Return the arrays to store for a batch, and its gradient rows if ``keep``."""
        collected = fishers.collector.collect(batch, examples, self._loaded.targets(batch, examples))
        result = fishers.factors(collected)
        stored = _stored_form(result, self._dtype, "logits" in self._store.array_names)
        return stored | self._diagonals(collected, result.valid_B), collected if keep else None

    def _diagonals(self, collected: Collected, valid_B: Tensor) -> dict[str, Tensor]:
        """Return the stored parts of the diagonals, divided by the diagonals' norms; zero for invalid examples."""
        rows, scales_B = collected.contributions, collected.labels.scales_B
        found = {}
        if self._store.top_entries is not None:
            top = top_entries(rows, scales_B, self._loaded.layout, self._store.top_entries)
            norms_B, found["diagonal_indices"] = top.norms_B, top.indices_Bk
            found["diagonal_values"] = top.values_Bk
        elif self._store.n_groups is not None:
            norms_B = diagonal_norms(rows, scales_B)
        else:
            return {}
        if self._store.n_groups is not None:
            found["grouped_diagonal"] = grouped_sums(rows, scales_B, self._groups)
        sizes_B1 = torch.where(norms_B > 0, norms_B, 1.0)[:, None]
        for name in found.keys() & {"diagonal_values", "grouped_diagonal"}:
            found[name] = (found[name] / sizes_B1).float()
        return {
            name: values.where(valid_B.reshape(-1, *[1] * (values.dim() - 1)), 0)
            for name, values in {**found, "diagonal_norms": norms_B}.items()
        }

    def _write(self, shard: int, arrays: dict[str, np.ndarray], began: float) -> CompletionRecord:
        start, stop = self._store.plan.bounds(shard)
        checksum, array_checksums = self._store.write(shard, arrays)
        record = CompletionRecord(
            shard=shard,
            start=start,
            stop=stop,
            checksum=checksum,
            n_invalid=int((~arrays["valid"]).sum()),
            seconds=time.monotonic() - began,
            signature=self._records.signature,
            array_checksums=array_checksums,
        )
        self._records.write(record)
        return record


def _joined(team: Team, own: list[dict[str, Tensor]], n_batches: int) -> list[dict[str, Tensor]]:
    """Return the arrays of all batches in the first process, and nothing in the others."""
    team.serve()  # the others may need this process for their batches
    arrays = {f"{place} {name}": value for place, part in enumerate(own) for name, value in part.items()}
    joined: list[dict[str, Tensor]] = [{} for _ in range(n_batches)]
    for rank, content in enumerate(team.gather_bytes(save(arrays))):
        for key, value in load(content).items():
            place, _, name = key.partition(" ")
            joined[int(place) * team.size + rank][name] = value
    return joined if team.rank == 0 else []


def _stored_form(batch: FisherBatch, dtype: torch.dtype, with_logits: bool) -> dict[str, Tensor]:
    """Return the arrays to store, with factors divided by √‖F‖_F so that they fit the range of half precision.

    The factors are rounded here because torch rounds many times faster than NumPy, with the same result.
    """
    stored = {
        "factors": batch.unit_factors_BRD.to(dtype),
        "frobenius_norms": batch.frobenius_norms_B,
        "grams": batch.grams_BRR,
        "ranks": batch.ranks_B,
        "kept_trace": batch.kept_trace_B,
        "losses": batch.losses_B.float(),
        "valid": batch.valid_B,
    }
    return stored | ({"logits": batch.logits.float()} if with_logits else {})
