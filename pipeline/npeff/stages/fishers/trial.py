"""A trial of the stage `fishers` on a worker: the same code on some of the examples, in a temporary folder."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from npeff.models.batch_size import peak_bytes
from npeff.models.loaded import ModelSpec
from npeff.runs.config import RunConfig
from npeff.stages.fishers.inspection import TaskFacts, TaskWorker
from npeff.stages.fishers.unit_times import UnitTimes, unit_times
from npeff.stages.fishers.worker import FisherWorker
from npeff.stages.inputs.trial import seconds_per_pass
from npeff.stages.lift.memory import fitting_directions
from npeff.stages.worker_specs import inspection_of
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
    units: UnitTimes
    """Times of the units of the other stages."""
    process: int
    """Process of the worker."""
    trial_seconds: float
    """Time of the trial, which a real run does not take."""


class TrialWorker:
    """Runs the trial of a task."""

    def __init__(self, model: ModelSpec, config: RunConfig) -> None:
        self._spec, self._config = model, config

    def try_out(self, _: None) -> Trial:
        """Prepare and inspect the task, compute and store a few small shards, and time the units of other stages.

        Raises the errors of `TaskWorker.inspect`.
        """
        config, wanted = self._config, self._config.fishers
        labels, seed = wanted.label_spec(config.seed), config.seed
        with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
            spec = replace(self._spec, cache=Path(folder) / "task")
            facts = TaskWorker(spec, labels, seed).inspect(inspection_of(config))

            def worker(shard_size: int) -> FisherWorker:
                path = Path(folder) / f"{shard_size}.zarr"
                FisherStore.create(
                    path,
                    n_examples=facts.n_examples,
                    rank=facts.rank,
                    dim=facts.sketch_dim,
                    n_classes=facts.n_classes,
                    shard_size=shard_size,
                    store_dtype=wanted.store_dtype,
                    attrs={},
                    with_logits=facts.with_logits,
                    top_entries=wanted.diagonal.top_entries,
                    n_groups=facts.n_groups if wanted.diagonal.groups else None,
                )
                records = ShardRecords(Path(folder) / "shards", "trial")
                return FisherWorker(spec, labels, wanted.sketch, seed, path, records, facts.batch_size)

            small = worker(min(2 * facts.batch_size, wanted.shard_size))
            began = time.monotonic()
            small.compute((0,))  # the first call is slower: it adapts to the model
            warm = time.monotonic()
            small.compute((0,))
            per_example = (time.monotonic() - warm) / min(small.shard_size, facts.n_examples)
            affordable = int(_SECONDS / _TIMED_SHARDS / per_example)
            chosen = min(wanted.shard_size, max(small.shard_size, affordable))
            timed = small if chosen == small.shard_size else worker(chosen)
            n_shards = timed.n_shards
            shards = {round((n_shards - 1) * (place + 0.5) / _TIMED_SHARDS) for place in range(_TIMED_SHARDS)}
            if timed is not small:
                timed.compute((0,))
            start = time.monotonic()
            records = [record for shard in sorted(shards) for record in timed.compute((shard,))]
            end = time.monotonic()
            n_examples = sum(record.stop - record.start for record in records)
            loaded, peak = spec.load(), peak_bytes(timed.device)
            per_pass = None if config.inputs is None else seconds_per_pass(loaded, facts.batch_size)
            units = unit_times(
                loaded,
                labels,
                batch_size=facts.batch_size,
                rank=facts.rank,
                dim=facts.sketch_dim,
                components=config.factorization.n_components,
                fitting=fitting_directions(config, facts.layout.size),
            )
            taken = time.monotonic() - began
            return Trial(facts, (end - start) / n_examples, peak, per_pass, units, os.getpid(), taken)
