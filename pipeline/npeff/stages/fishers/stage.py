"""The stage `fishers`: compute and store the low-rank Fisher of every example."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

from npeff.execution.executor import (
    ATTEMPTS,
    Executor,
    ExecutorError,
    FailedItem,
    ItemsFailedError,
    WorkerSpec,
    result_of,
)
from npeff.runs.config_reading import ConfigError
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.lineage import lineage_of
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, ProgressDisplay, display
from npeff.runs.stage import open_stage
from npeff.stages.earlier_results import check_matrices, shards_checksum, validate_problem
from npeff.stages.fishers import FISHERS
from npeff.stages.fishers.inspection import TaskFacts, TaskWorker
from npeff.stages.fishers.other_run import use_other_fishers
from npeff.stages.fishers.tables import write_example_tables, write_parameter_table
from npeff.stages.fishers.task_table import TaskTable
from npeff.stages.fishers.worker import FisherWorker
from npeff.stages.fitted_examples import example_weights
from npeff.stages.worker_specs import inspection_of, model_executor_for, model_spec, worker_spec
from npeff.storage.atomic import is_committed, remove_directory
from npeff.storage.checksums import file_checksum
from npeff.storage.errors import StoreError
from npeff.store.diagonal_store import DiagonalSums
from npeff.store.fisher_store import FisherStore
from npeff.store.schemas import SCHEMAS
from npeff.store.shard_records import CompletionRecord, ShardRecords

_MOST_SHARDS_PER_CALL = 2
_LONG_S = 3600.0
"""Time in seconds above which the stage tells how long it may take before it begins."""
_MOST_NAMED = 5
"""Largest number of failed shards in an error message."""


def compute_fishers(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Compute and store the low-rank Fisher of every example.

    Args:
        run: the run, its configuration, or the path of its directory or run file.
        executor: executor for the work. A new one is created if None.
        progress: display for the progress; see `npeff.runs.progress.display`.

    Returns:
        The record of the stage.

    Raises:
        NpeffError: the stage cannot be completed. The message is one line with the cause and the remedy.
    """
    run, progress = as_run(run), display(progress)
    with open_stage(run, FISHERS) as stage:
        if stage.done:
            return stage.done
        if run.fishers_home != run.path:
            return stage.complete(use_other_fishers(run))
        config = run.config
        table = TaskTable.of(run.partial_results("task"), config.fishers.shard_size)
        with model_executor_for(run, executor) as workers:
            with progress.stage("prepare", 1, "task") as tick:
                facts = _inspect(run, workers, table)
                tick(1)
            _say_what_is_left_out(facts, progress)
            _say_if_the_sketch_is_too_large(facts, config.fishers.sketch.kind, progress)
            _say_if_it_takes_hours(facts, run.config.executor.workers, progress)
            records, store = _open_fishers(run, facts)
            sums = DiagonalSums(run.partial_results("diagonal"), store.plan.n_shards, records.signature)
            summed = config.fishers.diagonal.mean and not run.diagonal_fisher.exists()
            worker = _worker(run, facts, store.attrs["batch_size"], records, sums)
            units = sums.missing() if summed else []
            complete, failed = _compute_missing(workers, worker, records, sums, units, progress)
            if failed:
                raise _failed_shards(failed, store, table)
        n_examples, n_invalid = facts.n_examples, sum(record.n_invalid for record in complete.values())
        if n_invalid:
            progress.say(f"{n_invalid} of {n_examples} examples have non-finite logits or gradients and are excluded")
        if summed:
            sums.fold(last=True)
            metadata = {"labels": config.fishers.labels, "model_fingerprint": facts.model_fingerprint}
            sums.write_mean(run.diagonal_fisher, n_examples - n_invalid, metadata)
        remove_directory(sums.folder)
        content = shards_checksum(complete)
        lineage = lineage_of(FISHERS, stage.made_from, content)
        write_example_tables(run, table.parts(), facts.class_names, lineage)
        remove_directory(table.path.parent)
        shapes = dict(zip(facts.layout.names, facts.layout.shapes, strict=True))
        write_parameter_table(run, shapes, facts.left_out, lineage)
        return stage.complete(
            {
                "lineage": lineage,
                "shards": content,
                "n_examples": n_examples,
                "n_invalid": n_invalid,
                "n_classes": facts.n_classes,
                "rank": store.rank,
                "n_parameters": facts.layout.size,
                "sketch_dim": store.dim,
                "n_shards": store.plan.n_shards,
                "worker_seconds": sum(record.seconds for record in complete.values()),
                "signature": records.signature,
                **({"diagonal_fisher": file_checksum(run.diagonal_fisher)} if config.fishers.diagonal.mean else {}),
            },
        )


def _worker(
    run: RunDirectory, facts: TaskFacts, batch_size: int, records: ShardRecords, sums: DiagonalSums
) -> WorkerSpec:
    config = run.config
    return worker_spec(
        run,
        FisherWorker,
        spread=config.executor.devices_per_model > 1,
        model=model_spec(run, facts.model_fingerprint),
        labels=config.fishers.label_spec(config.seed),
        sketch=config.fishers.sketch,
        seed=config.seed,
        store=run.fishers,
        records=records,
        batch_size=batch_size,
        sums=sums,
    )


def _compute_missing(
    workers: Executor,
    worker: WorkerSpec,
    records: ShardRecords,
    sums: DiagonalSums,
    units: list[int],
    progress: ProgressDisplay,
) -> tuple[dict[int, CompletionRecord], list[FailedItem]]:
    """Compute the shards without a record, and all shards of the units whose sums of diagonals are missing.

    Returns:
        The records of the complete shards, and the failed items with their shards.
    """
    complete, n_shards = records.complete(), sums.n_shards
    in_units = {shard for unit in units for shard in sums.shards(unit)}
    missing = [shard for shard in range(n_shards) if shard not in in_units | complete.keys()]
    records.withdraw(in_units & complete.keys())
    failed: list[FailedItem] = []
    with progress.stage("fishers", n_shards, "shards", done=len(complete)) as tick:
        try:
            for _, written in workers.map(worker, "compute_unit", units, keep_going=True):
                complete |= {record.shard: record for record in written}
                tick(len(complete))
                sums.fold()
        except ItemsFailedError as error:
            failed += [replace(each, item=sums.shards(each.item)) for each in error.failed]
        spans, split = _spans(missing, workers.workers), partial(_unrecorded, records)
        try:
            for _, written in workers.map(worker, "compute", spans, keep_going=True, split=split):
                complete |= {record.shard: record for record in written}
                tick(len(complete))
        except ItemsFailedError as error:
            failed += error.failed
    if not failed and len(complete) < n_shards:  # a worker recorded a shard and was then lost
        complete = records.complete()
    return complete, failed


def _say_what_is_left_out(facts: TaskFacts, progress: ProgressDisplay) -> None:
    """Name the parameters that are left out although the run file does not exclude them, one for each reason."""
    names = defaultdict[str, list[str]](list)
    for name, why in facts.left_out.items():
        if why.unsupported:
            names[why.reason].append(name)
    for reason, (first, *others) in names.items():
        more = f" (and {len(others)} more parameters)" if others else ""
        progress.say(f"left out of the Fishers: {first} {reason}{more}")


def _say_if_the_sketch_is_too_large(facts: TaskFacts, kind: str, progress: ProgressDisplay) -> None:
    if kind != "identity" and facts.sketch_dim >= facts.layout.size:
        progress.say(
            f"fishers.sketch: {facts.sketch_dim:,} coordinates for {facts.layout.size:,} parameters: "
            "{kind: identity} is exact, and the later stages take less time"
        )


def _say_if_it_takes_hours(facts: TaskFacts, workers: int, progress: ProgressDisplay) -> None:
    seconds = facts.seconds_per_example * facts.n_examples / workers
    if seconds > _LONG_S:
        number, one = facts.n_examples, facts.seconds_per_example
        progress.say(
            f"fishers: up to {seconds / 3600:.2g} hours for {number:,} examples on {workers} "
            f"worker{'s' if workers > 1 else ''}, judged from {one:.2g} s for one; `npeff estimate` measures all "
            "stages, and a limit of examples in task.options shortens them"
        )


def _inspect(run: RunDirectory, workers: Executor, table: TaskTable) -> TaskFacts:
    """Prepare and inspect the task on a worker, and refuse settings with which later stages would fail.

    The worker writes the table of the examples.
    """
    wanted = run.config.fishers
    seed = run.config.seed
    arguments = {"labels": wanted.label_spec(seed), "seed": seed, "table": table}
    inspection = worker_spec(run, TaskWorker, model=model_spec(run, None), **arguments)
    facts: TaskFacts = result_of(workers, inspection, "inspect", inspection_of(run.config))
    n_examples = facts.n_examples
    n_fit = n_examples - int(run.config.factorization.held_out_fraction * n_examples)
    validate_problem(run.config, n_fit, facts.rank)
    weights = run.config.resolved("factorization.example_weights")
    if weights is not None and weights not in SCHEMAS["examples"].names:
        example_weights(table.column(weights), weights)  # raises before any computation
    if (wanted.diagonal.top_entries or 0) > facts.layout.size:
        raise ConfigError(
            f"fishers.diagonal.top_entries = {wanted.diagonal.top_entries} must be at most {facts.layout.size}, the "
            "number of parameter entries"
        )
    return facts


def _open_fishers(run: RunDirectory, facts: TaskFacts) -> tuple[ShardRecords, FisherStore]:
    """Open or create ``fishers.zarr``. Returns its completion records and the store."""
    config = run.config
    signature = f"{config.signature('task', 'parameters', 'fishers', 'seed')}-{facts.model_fingerprint[:16]}"
    records = ShardRecords(run.shard_records, signature)
    layout: dict[str, Any] = {
        "n_examples": facts.n_examples,
        "rank": facts.rank,
        "dim": facts.sketch_dim,
        "n_classes": facts.n_classes,
        "shard_size": config.fishers.shard_size,
        "store_dtype": config.fishers.store_dtype,
        "attrs": {
            "labels": config.fishers.label_spec(config.seed).to_json(),
            "batch_size": facts.batch_size,
            "parameter_layout": facts.layout.to_json(),
            **({"diagonal_groups": facts.groups} if config.fishers.diagonal.groups else {}),
            "sketch": config.fishers.sketch.to_json(config.seed),
            "model_fingerprint": facts.model_fingerprint,
        },
        "with_logits": facts.with_logits,
        "top_entries": config.fishers.diagonal.top_entries,
        "n_groups": facts.n_groups if config.fishers.diagonal.groups else None,
    }
    if is_committed(run.fishers):
        try:
            there = FisherStore.open(run.fishers)
        except StoreError:
            there = FisherStore.restore(run.fishers, **layout)  # the user deleted damaged files of the store
        laid_out = (there.plan.n_examples, there.n_classes, there.dim)
        if laid_out != (facts.n_examples, facts.n_classes, facts.sketch_dim):
            raise StoreError(
                f"{run.fishers} was created for {laid_out[0]} examples, {laid_out[1]} classes and sketch dimension "
                f"{laid_out[2]}, but the task now has {facts.n_examples}, {facts.n_classes} and {facts.sketch_dim}",
                "restore the former data and model, or choose another run_dir",
                path=run.fishers,
            )
        check_matrices(there.attrs, facts.layout)
        return records, there
    for former in (run.shard_records, run.partial_results("diagonal")):  # remains of a deleted store
        remove_directory(former)
    run.diagonal_fisher.unlink(missing_ok=True)
    return records, FisherStore.create(run.fishers, **layout)


def _unrecorded(records: ShardRecords, shards: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shards of a failed span to retry one by one: those without a record."""
    complete = records.complete()
    return [(shard,) for shard in shards if shard not in complete]


def _failed_shards(failed: list[FailedItem], store: FisherStore, table: TaskTable) -> ExecutorError:
    """Return an error that names the failed shards and their examples."""
    named = []
    for each in failed[:_MOST_NAMED]:
        first, last = each.item[0], each.item[-1]
        start, stop = store.plan.bounds(first)[0], store.plan.bounds(last)[1]
        shards = f"shard {first}" if first == last else f"shards {first} to {last}"
        whose = " to ".join(map(repr, table.ids([start, stop - 1])))
        named.append(f"{shards} (examples {start} to {stop - 1}, {whose}) failed {ATTEMPTS} times: {each.reason}")
    if len(failed) > _MOST_NAMED:
        named.append(f"and {len(failed) - _MOST_NAMED} more")
    return ExecutorError(
        f"{'; '.join(named)}; all other shards are finished: correct these examples, or exclude them by returning NaN "
        "logits from the task, or give the workers more memory if their memory ran out; then run the same command "
        "again, which computes only the failed shards"
    )


def _spans(missing: list[int], workers: int) -> list[tuple[int, ...]]:
    """Divide shards into items: several per item, so that writing and computing overlap, but items for all workers."""
    size = max(1, min(_MOST_SHARDS_PER_CALL, len(missing) // (4 * workers)))
    return [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]
