"""A trial of the stage `fishers` on a worker: the same code on some of the examples, in a temporary folder."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from npeff.gradients import LabelSpec
from npeff.models.batch_size import peak_bytes
from npeff.models.loaded import ModelSpec
from npeff.sketches import SketchSpec
from npeff.stages.fishers.inspection import TaskFacts, TaskWorker
from npeff.stages.fishers.worker import FisherWorker
from npeff.stages.inputs.trial import seconds_per_pass
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords

_SECONDS = 10.0
"""Largest total time in seconds of the timed shards."""
_TIMED_SHARDS = 3


@dataclass(frozen=True)
class Trial:
    """Results of a trial."""

    facts: TaskFacts
    seconds_per_example: float
    """Time on one worker, including writing."""
    peak_bytes: int
    """Peak memory of the worker's process, or of its GPU."""
    seconds_per_input_pass: float | None
    """Time of a forward pass and a backward pass to the inputs, for one example; None if it is not asked for."""
    trial_seconds: float
    """Time of the trial shards, which a real run does not compute."""


class TrialWorker:
    """Runs the trial of a task."""

    def __init__(self, model: ModelSpec, labels: LabelSpec, seed: int) -> None:
        self._spec, self._labels, self._seed = model, labels, seed

    def try_out(self, wanted: tuple[SketchSpec, int | Literal["auto"], int, dict[str, Any], bool]) -> Trial:
        """Prepare and inspect the task, then compute and store a few small shards.

        Args:
            wanted: the arguments of `TaskWorker.inspect`, the options of the store (``shard_size``, ``store_dtype``,
                ``top_entries``, ``groups``), and whether to time a pass to the inputs.

        Raises the errors of `TaskWorker.inspect`.
        """
        sketch, _, _, store, with_inputs = wanted
        with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
            spec = replace(self._spec, cache=Path(folder) / "task")
            facts = TaskWorker(spec, self._labels, self._seed).inspect(wanted[:3])

            def worker(shard_size: int) -> FisherWorker:
                path = Path(folder) / f"{shard_size}.zarr"
                FisherStore.create(
                    path,
                    n_examples=len(facts.examples),
                    rank=facts.rank,
                    dim=facts.sketch_dim,
                    n_classes=facts.n_classes,
                    shard_size=shard_size,
                    store_dtype=store["store_dtype"],
                    attrs={},
                    with_logits=facts.with_logits,
                    top_entries=store["top_entries"],
                    n_groups=facts.n_groups if store["groups"] else None,
                )
                records = ShardRecords(Path(folder) / "shards", "trial")
                return FisherWorker(spec, self._labels, sketch, self._seed, path, records, facts.batch_size)

            small = worker(min(2 * facts.batch_size, store["shard_size"]))
            began = time.monotonic()
            small.compute((0,))  # the first call is slower: it adapts to the model
            warm = time.monotonic()
            small.compute((0,))
            per_example = (time.monotonic() - warm) / min(small.shard_size, len(facts.examples))
            affordable = int(_SECONDS / _TIMED_SHARDS / per_example)
            chosen = min(store["shard_size"], max(small.shard_size, affordable))
            timed = small if chosen == small.shard_size else worker(chosen)
            n_shards = timed.n_shards
            shards = {round((n_shards - 1) * (place + 0.5) / _TIMED_SHARDS) for place in range(_TIMED_SHARDS)}
            if timed is not small:
                timed.compute((0,))
            start = time.monotonic()
            records = [record for shard in sorted(shards) for record in timed.compute((shard,))]
            end = time.monotonic()
            n_examples = sum(record.stop - record.start for record in records)
            per_pass = seconds_per_pass(spec.load(), facts.batch_size) if with_inputs else None
            return Trial(facts, (end - start) / n_examples, peak_bytes(timed.device), per_pass, end - began)
