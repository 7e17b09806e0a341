"""The whole pipeline: each stage takes a run directory, goes on from what is in it, and leaves it one stage further.

    compute_fishers   model, examples        → fishers.zarr, shards/, tables/examples, tables/classes
    factorize         fishers.zarr           → factorization.zarr, tables/components, coefficients, history, …
    lift              fishers, factorization → directions.zarr, tables/layer_energy
    verify            directions, model      → tables/verification
    report            tables                 → report/index.html

A stage that is complete returns what it recorded. All may be called again after any crash.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.config import ConfigError, RunConfig
from pipeline.factorization import InvalidProblemError, SolverOptions, near_duplicates, validate_size
from pipeline.fisher import SketchSpec, UnsupportedModelError
from pipeline.progress import ProgressDisplay, SilentProgress
from pipeline.query import ComponentStore, QueryError, scoreboard, verdicts, write_report
from pipeline.result_tables import rows_to_columns, write_component_tables, write_example_tables
from pipeline.run_directory import RunDirectory, RunDirectoryError
from pipeline.runtime.executor import Executor, ExecutorError, WorkerSpec, make_executor
from pipeline.runtime.fisher_actor import FisherWorker
from pipeline.runtime.lift_actor import LiftPaths, LiftWorker
from pipeline.runtime.model import ModelSpec
from pipeline.runtime.solver_actor import SolverPaths, SolverWorker
from pipeline.runtime.solver_driver import run_solver
from pipeline.runtime.task_actor import TaskFacts, TaskWorker
from pipeline.runtime.verification_actor import VerificationPaths, VerificationWorker
from pipeline.store import (
    CheckpointStore,
    DirectionStore,
    FisherStore,
    ShardPlan,
    ShardRecords,
    StoreError,
    read_json,
    read_table,
    write_factorization,
    write_table,
)
from pipeline.tasks import TaskError

USER_ERRORS = (
    ConfigError,
    RunDirectoryError,
    TaskError,
    UnsupportedModelError,
    InvalidProblemError,
    StoreError,
    QueryError,
    ExecutorError,
)
"""What a user can cause or mend: the message is one line that says what to do."""

Summary = dict[str, Any]

_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)
"""In the message of torch's plain RuntimeError, where memory of the CPU runs out."""


def run(config: RunConfig | RunDirectory, *, progress: ProgressDisplay | None = None) -> RunDirectory:
    """Every stage in order, going on from whatever is there already."""
    directory = config if isinstance(config, RunDirectory) else RunDirectory.create(config)
    stages = {"fishers": compute_fishers, "factorize": factorize, "lift": lift, "verify": verify}
    if progress is not None:
        progress.say(f"run {directory.path}")
    unfinished = any(recorded(directory, name) is None for name in stages)
    with directory.lock():
        # Workers are started once for all stages, and not at all where there is nothing to do.
        with _executor(directory, None) if unfinished else nullcontext() as executor:
            for stage in stages.values():
                stage(directory, executor=executor, progress=progress)
        report(directory, progress=progress)
    return directory


def compute_fishers(
    run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None
) -> Summary:
    """Compute and store the low-rank Fisher of every example."""
    with _stage(run, "fishers") as stage:
        if stage.done:
            return stage.done
        progress, config = progress or SilentProgress(), run.config
        with _executor(run, executor) as workers:
            model, sketch = _model(run), _sketch(config)
            inspection = WorkerSpec(TaskWorker, {"model": model}, run.worker_lease)
            with progress.stage("prepare", 1, "task") as tick:
                facts: TaskFacts = next(iter(workers.map(inspection, "inspect", [sketch])))[1]
                tick(1)
            n_examples, rank = len(facts.examples), facts.n_classes - 1
            n_fit = n_examples - int(config.factorization.held_out_fraction * n_examples)
            _validate_size(config, n_fit, rank)
            if not run.fishers.exists():  # records of Fishers that somebody deleted
                shutil.rmtree(run.shard_records, ignore_errors=True)
            records = ShardRecords(
                run.shard_records,
                f"{config.signature('task', 'parameters', 'fishers', 'seed')}-{facts.model_fingerprint[:16]}",
            )
            complete = records.complete()
            _create_fishers(run, facts, sketch)
            plan = ShardPlan(n_examples, config.fishers.shard_size)
            missing = [shard for shard in range(plan.n_shards) if shard not in complete]
            worker = WorkerSpec(
                FisherWorker,
                {
                    "model": model,
                    "sketch": sketch,
                    "store": run.fishers,
                    "records": records,
                    "batch_size": config.fishers.batch_size,
                },
                run.worker_lease,
            )
            with progress.stage("fishers", plan.n_shards, "shards", done=len(complete)) as tick:
                for shard, record in workers.map(worker, "compute", missing):
                    complete[shard] = record
                    tick(len(complete))
        n_invalid = sum(record.n_invalid for record in complete.values())
        if n_invalid:
            progress.say(f"{n_invalid} of {n_examples} examples have non-finite logits or gradients and are left out")
        write_example_tables(run, facts.examples, facts.class_names)
        return stage.complete(
            {
                "n_examples": n_examples,
                "n_invalid": n_invalid,
                "n_classes": facts.n_classes,
                "rank": rank,
                "n_parameters": facts.layout.size,
                "sketch_dim": FisherStore.open(run.fishers).dim,
                "n_shards": plan.n_shards,
                "worker_seconds": sum(record.seconds for record in complete.values()),
                "signature": records.signature,
            },
        )


def factorize(
    run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None
) -> Summary:
    """Fit non-negative coefficients and components to the stored Fishers."""
    with _stage(run, "factorize", after="fishers") as stage:
        if stage.done:
            return stage.done
        progress, config, wanted = progress or SilentProgress(), run.config, run.config.factorization
        checksums = _checksums(run)
        options = SolverOptions(
            n_components=wanted.n_components,
            max_iterations=wanted.max_iterations,
            tolerance=wanted.tolerance,
            n_starts=wanted.n_starts,
            subsample=wanted.subsample,
            seed=config.seed,
        )
        examples = read_table(run.table("examples"), "examples")
        n_fit = int((examples["valid"].to_numpy() & (np.asarray(examples["split"].to_pylist()) == "fit")).sum())
        if n_fit == 0:
            raise InvalidProblemError(
                "none of the examples that the components are to be fitted on has finite logits and gradients: look "
                "for NaN in the examples, or give more of them"
            )
        if not bool(examples.filter(examples["valid"])["fisher_norm"].to_numpy().any()):
            raise InvalidProblemError(
                "the Fishers of all examples are zero: the selected parameters do not change the logits, or the model "
                "is certain of every prediction"
            )
        _validate_size(config, n_fit, _record(run, "fishers")["rank"])
        worker = WorkerSpec(
            SolverWorker,
            {
                "paths": SolverPaths(run.fishers, run.table("examples")),
                "options": options,
                "device": _device(config),
                "timeout_s": config.executor.timeout_s,
            },
            run.worker_lease,
        )
        fishers = _record(run, "fishers")["signature"]
        checkpoints = CheckpointStore(run.checkpoints, config_hash=config.signature("factorization", "seed") + fishers)
        with _executor(run, executor) as workers, progress.stage("factorize", options.max_iterations, "steps") as tick:
            solved = run_solver(
                workers,
                worker,
                checkpoints,
                checksums,
                checkpoint_every=wanted.checkpoint_every,
                on_iteration=lambda row: tick(row["iteration"], f"explained {row['explained']:.4f}"),
                on_event=progress.say,
            )
            tick(solved.history[-1]["iteration"], solved.stopped, last=True)
        result = solved.results[0]
        coefficients = {shard: rows for part in solved.results for shard, rows in part.coefficients.items()}
        coefficients_NK = np.concatenate([coefficients[shard] for shard in sorted(coefficients)])
        duplicates = near_duplicates(torch.tensor(result.components_KD))
        summary = {
            "n_components": options.n_components,
            "loss": result.loss,
            "explained": result.explained,
            "explained_held_out": result.explained_held_out,
            "n_iter": solved.history[-1]["iteration"],
            "stopped": solved.stopped,
            "n_fit": n_fit,
            "near_duplicates": duplicates,
        }
        write_factorization(run.factorization, result.components_KD, coefficients_NK, summary)
        run.reopen("lift")  # which adds to the components table
        write_component_tables(run, result.components_KD, coefficients_NK)
        write_table(run.table("history"), "history", rows_to_columns(solved.history, "history"))
        progress.say(
            f"explained {result.explained:.4f} of the fitted Fishers"
            + (f", {result.explained_held_out:.4f} of the held-out ones" if result.explained_held_out else "")
            + f" ({solved.stopped} after {summary['n_iter']} steps)"
        )
        return stage.complete(summary)


def lift(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Lift the components from the sketch to directions in parameter space."""
    with _stage(run, "lift", after="factorize") as stage:
        if stage.done:
            return stage.done
        progress, config = progress or SilentProgress(), run.config
        n_components = config.factorization.n_components
        layout = FisherStore.open(run.fishers).attrs["parameter_layout"]
        shapes = {name: tuple(shape) for name, shape in zip(layout["names"], layout["shapes"], strict=True)}
        n_parameters = sum(math.prod(shape) for shape in shapes.values())
        results = run.partial_results("lift")
        if not run.directions.exists():
            shutil.rmtree(results, ignore_errors=True)  # of directions that somebody deleted
            DirectionStore.create(run.directions, n_components=n_components, shapes=shapes, attrs={})
        lifted = {component: read_json(path) for component, path in finished(results).items()}
        missing = [component for component in range(n_components) if component not in lifted]
        worker = WorkerSpec(
            LiftWorker,
            {
                "model": _model(run),
                "sketch": _sketch(config),
                "paths": LiftPaths(run.fishers, run.factorization, run.table("examples"), run.directions, results),
                "checksums": _checksums(run),
                "batch_size": config.fishers.batch_size,
            },
            run.worker_lease,
        )
        with (
            progress.stage("lift", n_components, "directions", done=len(lifted)) as tick,
            _executor(run, executor) as workers,
        ):
            for block, facts in workers.map(worker, "lift", _blocks(run, missing, n_parameters, workers.workers)):
                lifted |= dict(zip(block, facts, strict=True))
                tick(len(lifted))
        facts = [lifted[component] for component in range(n_components)]
        energy = [
            {"component": fact["component"], "parameter": name, "energy": share}
            for fact in facts
            for name, share in fact["energy"].items()
        ]
        cosines = [fact["cosine"] for fact in facts]
        components = read_table(run.table("components"), "components").to_pydict() | {"lift_cosine": cosines}
        write_table(run.table("layer_energy"), "layer_energy", rows_to_columns(energy, "layer_energy"))
        write_table(run.table("components"), "components", components)
        return stage.complete({"n_components": n_components, "median_cosine": float(np.median(cosines))})


def verify(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Move the model along every direction and compare what changes with the controls."""
    with _stage(run, "verify", after="lift") as stage:
        if stage.done:
            return stage.done
        progress, config, wanted = progress or SilentProgress(), run.config, run.config.verification
        n_components = config.factorization.n_components
        results = run.partial_results("verify")
        verified = {
            component: read_table(path, "verification").to_pylist() for component, path in finished(results).items()
        }
        worker = WorkerSpec(
            VerificationWorker,
            {
                "model": _model(run),
                "paths": VerificationPaths(run.factorization, run.directions, run.table("examples"), results),
                "n_top": wanted.top_examples,
                "n_baseline": wanted.baseline_examples,
                "target_kl": wanted.target_kl,
                "seed": config.seed,
                "batch_size": config.fishers.batch_size,
            },
            run.worker_lease,
        )
        missing = [component for component in range(n_components) if component not in verified]
        with (
            progress.stage("verify", n_components, "components", done=len(verified)) as tick,
            _executor(run, executor) as workers,
        ):
            for component, rows in workers.map(worker, "verify", missing):
                verified[component] = rows
                tick(len(verified))
        rows = [row for component in sorted(verified) for row in verified[component]]
        write_table(run.table("verification"), "verification", rows_to_columns(rows, "verification"))
        scores = [asdict(score) for score in scoreboard(verdicts(rows))]
        return stage.complete({"n_components": n_components, "scores": scores})


def report(run: RunDirectory, *, progress: ProgressDisplay | None = None) -> Path:
    """Write the report, one HTML file, from whatever is there."""
    with run.lock():
        return write_report(run.path, top_examples=run.config.report.top_examples)


def open_components(run_dir: str | Path) -> ComponentStore:
    """A run's component store, to ask; it only reads."""
    return ComponentStore.open(run_dir)


def submit(
    config: RunConfig, address: str, *, py_modules: Sequence[Path] = (), follow: bool, say: Callable[[str], None]
) -> int:
    """The whole run as a Ray job on another machine's cluster; its exit code, or 0 at once if it is not followed."""
    from pipeline.runtime.job import submit_job

    there = config.model_copy(update={"run_dir": str(Path(config.run_dir).expanduser().absolute())})
    return submit_job(there.to_yaml(), address, py_modules=py_modules, follow=follow, say=say)


STAGES: dict[str, Callable[..., object]] = {
    "fishers": compute_fishers,
    "factorize": factorize,
    "lift": lift,
    "verify": verify,
    "report": report,
}


def finished(folder: Path) -> dict[int, Path]:
    """Components whose result a worker has left in ``folder``, with its file."""
    return {int(path.stem): path for path in sorted(folder.glob("*.*")) if path.stem.isdecimal()}


_OUTPUTS = {
    "fishers": ("fishers.zarr", "tables/examples.parquet", "tables/classes.parquet"),
    "factorize": (
        "factorization.zarr",
        *(f"tables/{name}.parquet" for name in ("components", "top_examples", "coefficients", "history")),
    ),
    "lift": ("directions.zarr", "tables/layer_energy.parquet"),
    "verify": ("tables/verification.parquet",),
}


def recorded(run: RunDirectory, stage: str) -> Summary | None:
    """What a complete stage said of itself; None before that, and after something that it wrote has been deleted: this
    is how damaged files are made again."""
    record = run.record(stage)
    if record is None or not all((run.path / name).exists() for name in _OUTPUTS[stage]):
        return None
    if stage == "fishers" and len(finished(run.shard_records)) < record["n_shards"]:
        return None
    return record


@dataclass(frozen=True)
class _Stage:
    """A stage in progress, and what it recorded when it was complete before."""

    run: RunDirectory
    name: str
    done: Summary | None
    began: float

    def complete(self, summary: Summary) -> Summary:
        return self.run.complete(self.name, {**summary, "seconds": time.monotonic() - self.began})


@contextmanager
def _stage(run: RunDirectory, name: str, after: str | None = None) -> Iterator[_Stage]:
    """Hold the run for a stage.

    Raises:
        RunDirectoryError: the run is in use, or the stage before is not complete.
    """
    with run.lock():
        stage = _Stage(run, name, recorded(run, name), time.monotonic())
        if stage.done is None and after is not None:
            _record(run, after)
        try:
            yield stage
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
                raise
            raise ExecutorError(
                f"stage {name} ran out of memory ({str(error).splitlines()[0] if str(error) else 'no details'}): lower "
                "fishers.batch_size, fishers.sketch.dim or lift.memory_limit_mb, or give the workers more memory"
            ) from error


def _record(run: RunDirectory, stage: str) -> Summary:
    record = recorded(run, stage)
    if record is None:
        raise RunDirectoryError(f"stage {stage} of {run.path} is not complete: run `npeff {stage} {run.path}` first")
    return record


def _executor(run: RunDirectory, given: Executor | None) -> AbstractContextManager[Executor]:
    """``given``, which its owner closes, or the one that the run asks for."""
    return nullcontext(given) if given is not None else make_executor(**run.config.executor.model_dump())


def _device(config: RunConfig) -> str:
    return "cuda" if config.executor.gpus_per_worker > 0 else "cpu"


def _model(run: RunDirectory) -> ModelSpec:
    config = run.config
    return ModelSpec(
        task=config.task.name,
        options=config.task.options,
        cache=run.task_cache,
        include=config.parameters.include,
        exclude=config.parameters.exclude,
        device=_device(config),
    )


def _sketch(config: RunConfig) -> SketchSpec:
    return SketchSpec(kind=config.fishers.sketch.kind, dim=config.fishers.sketch.dim, seed=config.seed)


def _create_fishers(run: RunDirectory, facts: TaskFacts, sketch: SketchSpec) -> None:
    """Lay out ``fishers.zarr``, unless an interrupted run has."""
    if run.fishers.exists():
        there = FisherStore.open(run.fishers)
        laid_out = (there.plan.n_examples, there.n_classes, there.dim)
        if laid_out != (len(facts.examples), facts.n_classes, facts.sketch_dim):
            raise StoreError(
                f"{run.fishers} was laid out for {laid_out[0]} examples, {laid_out[1]} classes and sketch dimension "
                f"{laid_out[2]}, and the task has {len(facts.examples)}, {facts.n_classes} and {facts.sketch_dim} now: "
                "give it the former data and model, or choose another run_dir"
            )
        return
    config = run.config.fishers
    FisherStore.create(
        run.fishers,
        n_examples=len(facts.examples),
        rank=facts.n_classes - 1,
        dim=facts.sketch_dim,
        n_classes=facts.n_classes,
        shard_size=config.shard_size,
        store_dtype=config.store_dtype,
        attrs={
            "labels": config.labels,
            "parameter_layout": facts.layout.to_json(),
            "sketch": sketch.to_json(),
            "model_fingerprint": facts.model_fingerprint,
        },
    )


def _validate_size(config: RunConfig, n_fit: int, rank: int) -> None:
    wanted = config.factorization
    validate_size(n_fit, rank, wanted.n_components)
    if wanted.subsample * rank < wanted.n_components:
        raise InvalidProblemError(
            f"factorization.subsample={wanted.subsample} examples of rank {rank} cannot start n_components="
            f"{wanted.n_components} components: set it to {math.ceil(wanted.n_components / rank)} or more"
        )


def _checksums(run: RunDirectory) -> dict[int, str]:
    """Checksum of every stored shard.

    Raises:
        StoreError: a shard has no record, though the stage was complete: somebody deleted it to have it recomputed.
    """
    fishers = _record(run, "fishers")
    records = ShardRecords(run.shard_records, fishers["signature"]).complete()
    missing = [shard for shard in range(fishers["n_shards"]) if shard not in records]
    if missing:
        raise StoreError(f"shard {missing[0]} of {run.fishers} has no record: run `npeff fishers {run.path}` first")
    return {shard: record.checksum for shard, record in records.items()}


def _blocks(run: RunDirectory, missing: list[int], n_parameters: int, workers: int) -> list[tuple[int, ...]]:
    """Components to lift in one pass: as many as the memory limit allows, yet a share for every worker."""
    direction_bytes = 4 * n_parameters
    fitting = max(1, run.config.lift.memory_limit_mb * 2**20 // direction_bytes)
    size = max(1, min(fitting, math.ceil(len(missing) / workers)))
    return [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]
