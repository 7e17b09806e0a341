"""What all stages share: when one is complete, how it holds the run, and what the run file means to its workers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.config import RunConfig
from pipeline.factorization import InvalidProblemError, validate_size
from pipeline.fisher import LabelSpec, SketchSpec
from pipeline.interchange import IMPORTED_TASK
from pipeline.run_directory import RunDirectory, RunDirectoryError
from pipeline.runtime.executor import Executor, ExecutorError, WorkerSpec, make_executor, out_of_memory
from pipeline.runtime.fitted_examples import FittedExamples
from pipeline.runtime.model import ModelSpec
from pipeline.store import (
    FisherStore,
    ShardRecords,
    StoreError,
    differences_in_space,
    file_checksum,
    is_committed,
    json_checksum,
    open_factorization,
    read_json,
    remove_directory,
    write_json_atomically,
)

Summary = dict[str, Any]

_OUTPUTS = {
    "fishers": ("fishers.zarr", *(f"tables/{name}.parquet" for name in ("examples", "classes", "parameters"))),
    "factorize": (
        "factorization.zarr",
        *(f"tables/{name}.parquet" for name in ("components", "top_examples", "coefficients", "history")),
    ),
    "select": ("tables/selection.parquet", "tables/selection_fits.parquet"),
    "attribute": ("tables/position_shares.parquet",),
    "lift": ("directions.zarr", "tables/layer_energy.parquet", "tables/components.parquet"),
    "repair": ("tables/repair.parquet", "tables/repair_steps.parquet"),
    "verify": ("tables/verification.parquet", "tables/selectivity.parquet"),
}


def finished(folder: Path) -> dict[int, Path]:
    """Units (shards, components) whose result or record a worker has left in ``folder``, with its file."""
    return {int(path.stem): path for path in sorted(folder.glob("*.*")) if path.stem.isdecimal()}


def recorded(run: RunDirectory, stage: str) -> Summary | None:
    """What a complete stage said of itself; None before that, and after something that it wrote has been deleted: this
    is how damaged files are made again."""
    record = record_as_sealed(run, stage)
    if record is None or not all(is_committed(path) for path in outputs_of(run, stage)):
        return None
    if stage == "factorize" and _may_go_on(run.config, record):
        return None
    if stage == "fishers" and len(finished(run.shard_records)) < record["n_shards"]:
        return None
    return record


def outputs_of(run: RunDirectory, stage: str) -> list[Path]:
    """What is there of a complete stage."""
    outputs = [run.path / name for name in _OUTPUTS[stage]]
    if stage == "fishers" and run.config.fishers.diagonal.mean:
        outputs.append(run.diagonal_fisher)
    if stage == "verify" and run.config.verification.ablation:
        outputs.append(run.table("ablation"))
    return outputs


def vouched_for(output: Path, stage: str) -> bool:
    """Whether the record of a stage holds the checksum of this output's file: a table that no later stage writes again.
    Parquet's own checksums are of its pages only."""
    return output.suffix == ".parquet" and (output.stem != "components" or stage == "lift")


def unit_files(run: RunDirectory, stage: str, component: int) -> dict[str, Path]:
    """What `verify` or `attribute` leaves of one component, by the table that it is a part of."""
    results, name = run.partial_results(stage), f"{component:05d}.parquet"
    if stage == "attribute":
        return {"position_shares": results / name}
    files = {"verification": results / name, "selectivity": results / "selectivity" / name}
    return files | ({"ablation": results / "ablation" / name} if run.config.verification.ablation else {})


def unit_checksums(run: RunDirectory, stage: str, components: Iterable[int]) -> dict[str, str]:
    """Of those files, by component, for the stage's record: Parquet's own checksums are of its pages only."""
    files = {f"{component:05d}": unit_files(run, stage, component) for component in components}
    return {
        name: json_checksum({table: file_checksum(path) for table, path in each.items()})
        for name, each in files.items()
    }


def record_as_sealed(run: RunDirectory, stage: str) -> Summary | None:
    """The record of a complete stage, whatever has become of what it wrote; None before that.

    Raises:
        RunDirectoryError: it is damaged.
    """
    record = run.record(stage)
    if record is None:
        return None
    said = {key: value for key, value in record.items() if key not in ("stage", "completed_at", "checksum")}
    if record.get("checksum") not in (None, json_checksum(said)):
        path = run.path / "stages" / f"{stage}.json"
        raise RunDirectoryError(
            f"{path} is damaged (it does not match its checksum): delete it and run `npeff {stage} {run.path}` again"
        )
    return record


def _may_go_on(config: RunConfig, factorized: Summary) -> bool:
    """Whether the factorization ended at a limit that has been raised since."""
    return factorized["stopped"] == "max_iterations" and factorized["n_iter"] < config.factorization.max_iterations


@dataclass(frozen=True)
class Stage:
    """A stage in progress, and what it recorded when it was complete before."""

    run: RunDirectory
    name: str
    done: Summary | None
    began: float

    def complete(self, summary: Summary) -> Summary:
        outputs = outputs_of(self.run, self.name)
        tables = {path.stem: file_checksum(path) for path in outputs if vouched_for(path, self.name)}
        said = {**summary, "tables": tables, "seconds": time.monotonic() - self.began}
        return self.run.complete(self.name, {**said, "checksum": json_checksum(said)})


@contextmanager
def open_stage(run: RunDirectory, name: str, after: str | None = None) -> Iterator[Stage]:
    """Hold the run for a stage.

    Raises:
        RunDirectoryError: the run is in use, or the stage before is not complete.
    """
    with run.lock():
        stage = Stage(run, name, recorded(run, name), time.monotonic())
        if stage.done is None and after is not None:
            record_of(run, after)
        try:
            yield stage
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            raise ExecutorError(
                f"stage {name} ran out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}): lower "
                "fishers.batch_size, fishers.sketch.dim (in a new run_dir) or lift.memory_limit_mb, or give the "
                "workers more memory"
            ) from error


def record_of(run: RunDirectory, stage: str) -> Summary:
    record = recorded(run, stage)
    if record is None:
        raise RunDirectoryError(f"stage {stage} of {run.path} is not complete: run `npeff {stage} {run.path}` first")
    return record


def lifted_components(run: RunDirectory) -> list[int]:
    """Those that have a direction."""
    record = record_of(run, "lift")
    return list(record.get("components", range(record["n_components"])))


def forget_other_requests(results: Path, request: str) -> bool:
    """Take away the results of units, in ``results``, that were made for another request; whether that was so."""
    asked = results / "request.json"
    if asked.exists() and read_json(asked)["request"] == request:
        return False
    remove_directory(results)
    write_json_atomically(asked, {"request": request})
    return True


def executor_for(run: RunDirectory, given: Executor | None) -> AbstractContextManager[Executor]:
    """``given``, which its owner closes, or the one that the run asks for."""
    return nullcontext(given) if given is not None else make_executor(**run.config.executor.model_dump())


def worker_spec(run: RunDirectory, worker_class: type, **arguments: Any) -> WorkerSpec:
    """A worker of this run, which the next command waits for if this one is killed."""
    return WorkerSpec(worker_class, arguments, run.worker_lease)


def device_of(config: RunConfig) -> str:
    return "cuda" if config.executor.gpus_per_worker > 0 else "cpu"


def model_of(config: RunConfig, cache: Path, fingerprint: str | None) -> ModelSpec:
    """The model of a run file, whose task keeps what it prepares in ``cache``."""
    return ModelSpec(
        task=config.task.name,
        options=config.task.options,
        cache=cache,
        include=config.parameters.include,
        exclude=config.parameters.exclude,
        device=device_of(config),
        fingerprint=fingerprint,
    )


def model_spec(run: RunDirectory, fingerprint: str | None) -> ModelSpec:
    """The model as a worker loads it; it must be the one of the fingerprint, where there is one already."""
    config = run.config
    if config.task.name == IMPORTED_TASK:
        raise RunDirectoryError(
            f"{run.path} was imported from a file and has no model: only factorize, query and report"
        )
    return model_of(config, run.task_cache, fingerprint)


def fitted_examples(run: RunDirectory) -> FittedExamples:
    """Which examples components are fitted on, as the run file says."""
    wanted = run.config.factorization
    return FittedExamples(run.fishers, run.table("examples"), wanted.examples == "mispredicted", wanted.example_weights)


def sketch_spec(config: RunConfig) -> SketchSpec:
    wanted = config.fishers.sketch
    return SketchSpec(kind=wanted.kind, dim=wanted.dim, seed=config.seed, size=wanted.size)


def label_spec(config: RunConfig) -> LabelSpec:
    wanted = config.fishers
    return LabelSpec(kind=wanted.labels, rank=wanted.rank, kept_trace=wanted.kept_trace, seed=config.seed)


def inspection_of(config: RunConfig) -> tuple[SketchSpec, int | Literal["auto"], int]:
    """What `TaskWorker.inspect` is asked: the sketch, the batch size, and the bytes that a batch may take."""
    return sketch_spec(config), config.fishers.batch_size, config.fishers.memory_limit_mb * 2**20


def fingerprint_of(run: RunDirectory) -> str:
    """Of the model that the stored Fishers are of."""
    return str(FisherStore.open(run.fishers).attrs["model_fingerprint"])


def components_of(run: RunDirectory, other: str | Path) -> np.ndarray:
    """The components (K, D) of another run, which mean the same in this one.

    Raises:
        RunDirectoryError: its model, parameters, sketch or seed is another, or it has no components yet.
    """
    source = RunDirectory.open(other)
    record_of(source, "factorize")
    if (kind := source.config.factorization.kind) != "fishers":
        raise RunDirectoryError(
            f"the components of {source.path} are of kind {kind}: give a run with factorization.kind: fishers"
        )
    mine, theirs = (FisherStore.open(each.fishers).attrs for each in (run, source))
    if different := differences_in_space(mine, theirs):
        raise RunDirectoryError(
            f"the components of {source.path} mean nothing in {run.path}: the runs differ in {', '.join(different)}; "
            "make both with the same model, parameters, fishers.sketch and seed"
        )
    return open_factorization(source.factorization).read_components()


def checksums_of(run: RunDirectory) -> dict[int, str]:
    """Checksum of every stored shard.

    Raises:
        StoreError: a shard has no record, though the stage was complete: somebody deleted it to have it recomputed.
    """
    fishers = record_of(run, "fishers")
    records = ShardRecords(run.shard_records, fishers["signature"]).complete()
    missing = [shard for shard in range(fishers["n_shards"]) if shard not in records]
    if missing:
        raise StoreError(f"shard {missing[0]} of {run.fishers} has no record: run `npeff fishers {run.path}` first")
    return {shard: record.checksum for shard, record in records.items()}


def validate_problem(config: RunConfig, n_fit: int, rank: int) -> None:
    """Refuse a factorization of `n_fit` examples of this rank that could not start.

    Raises:
        InvalidProblemError: more components than factor rows, of all fitted examples or of the subsample.
    """
    wanted = config.factorization
    if wanted.kind != "fishers":
        rank = 1
    validate_size(n_fit, rank, wanted.n_components)
    if wanted.subsample * rank < wanted.n_components:
        raise InvalidProblemError(
            f"factorization.subsample={wanted.subsample} examples of rank {rank} cannot start n_components="
            f"{wanted.n_components} components: set it to {math.ceil(wanted.n_components / rank)} or more"
        )
