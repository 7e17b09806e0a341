"""The whole pipeline: each stage takes a run directory, goes on from what is in it, and leaves it one stage further.

    compute_fishers   model, examples        → fishers.zarr, shards/, tables/examples, tables/classes, …
    factorize         fishers.zarr           → factorization.zarr, tables/components, coefficients, history, …
    lift              fishers, factorization → directions.zarr, tables/layer_energy
    verify            directions, model      → tables/verification
    report            tables                 → report/index.html

A stage that is complete returns what it recorded. All may be called again after any crash.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from pipeline.config import ConfigError, RunConfig
from pipeline.factorization import InvalidProblemError, SolverOptions, near_duplicates, validate_size
from pipeline.fisher import UnsupportedModelError
from pipeline.progress import ProgressDisplay, SilentProgress
from pipeline.query import ComponentStore, QueryError, scoreboard, verdicts, write_report
from pipeline.result_tables import (
    rows_to_columns,
    write_component_tables,
    write_example_tables,
    write_parameter_table,
)
from pipeline.run_directory import RunDirectory, RunDirectoryError
from pipeline.runtime.executor import Executor, ExecutorError
from pipeline.runtime.fisher_actor import FisherWorker
from pipeline.runtime.lift_actor import LiftPaths, LiftWorker
from pipeline.runtime.solver_actor import SolverPaths, SolverWorker
from pipeline.runtime.solver_driver import SolverRun, run_solver
from pipeline.runtime.task_actor import TaskFacts, TaskWorker
from pipeline.runtime.verification_actor import VerificationPaths, VerificationWorker
from pipeline.stage import (
    Summary,
    device_of,
    executor_for,
    finished,
    inspection_of,
    label_spec,
    model_spec,
    open_stage,
    record_of,
    recorded,
    sketch_spec,
    worker_spec,
)
from pipeline.store import (
    CheckpointStore,
    DiagonalSums,
    DirectionStore,
    FisherStore,
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

_MOST_SHARDS_PER_CALL = 2


def run(config: RunConfig | RunDirectory, *, progress: ProgressDisplay | None = None) -> RunDirectory:
    """Every stage in order, going on from whatever is there already."""
    directory = config if isinstance(config, RunDirectory) else RunDirectory.create(config)
    stages = {"fishers": compute_fishers, "factorize": factorize, "lift": lift, "verify": verify}
    if progress is not None:
        progress.say(f"run {directory.path}")
    unfinished = any(recorded(directory, name) is None for name in stages)
    with directory.lock():
        # Workers are started once for all stages, and not at all where there is nothing to do.
        with executor_for(directory, None) if unfinished else nullcontext() as executor:
            for stage in stages.values():
                stage(directory, executor=executor, progress=progress)
        report(directory, progress=progress)
    return directory


def compute_fishers(
    run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None
) -> Summary:
    """Compute and store the low-rank Fisher of every example."""
    with open_stage(run, "fishers") as stage:
        if stage.done:
            return stage.done
        progress, config = progress or SilentProgress(), run.config
        with executor_for(run, executor) as workers:
            with progress.stage("prepare", 1, "task") as tick:
                facts = _inspect(run, workers)
                tick(1)
            records, store = _open_fishers(run, facts)
            complete = records.complete()
            sums = DiagonalSums(run.partial_results("diagonal"), store.plan.n_shards, records.signature)
            summed = config.fishers.diagonal.mean and not run.diagonal_fisher.exists()
            units = sums.missing() if summed else []
            in_units = {shard for unit in units for shard in sums.shards(unit)}
            missing = [shard for shard in range(store.plan.n_shards) if shard not in in_units | complete.keys()]
            worker = worker_spec(
                run,
                FisherWorker,
                model=model_spec(run, facts.model_fingerprint),
                labels=label_spec(config),
                sketch=sketch_spec(config),
                store=run.fishers,
                records=records,
                batch_size=store.attrs["batch_size"],
                sums=sums,
            )
            with progress.stage("fishers", store.plan.n_shards, "shards", done=len(complete)) as tick:
                for method, items in (("compute_unit", units), ("compute", _spans(missing, workers.workers))):
                    for _, written in workers.map(worker, method, items):
                        complete |= {record.shard: record for record in written}
                        tick(len(complete))
                        if method == "compute_unit":
                            sums.fold()
        n_examples, n_invalid = len(facts.examples), sum(record.n_invalid for record in complete.values())
        if n_invalid:
            progress.say(f"{n_invalid} of {n_examples} examples have non-finite logits or gradients and are left out")
        if summed:
            sums.fold(last=True)
            metadata = {"labels": config.fishers.labels, "model_fingerprint": facts.model_fingerprint}
            sums.write_mean(run.diagonal_fisher, n_examples - n_invalid, metadata)
        shutil.rmtree(sums.folder, ignore_errors=True)
        write_example_tables(run, facts.examples, facts.class_names)
        shapes = dict(zip(facts.layout.names, facts.layout.shapes, strict=True))
        write_parameter_table(run, shapes, facts.left_out)
        return stage.complete(
            {
                "n_examples": n_examples,
                "n_invalid": n_invalid,
                "n_classes": facts.n_classes,
                "rank": store.rank,
                "n_parameters": facts.layout.size,
                "sketch_dim": store.dim,
                "n_shards": store.plan.n_shards,
                "worker_seconds": sum(record.seconds for record in complete.values()),
                "signature": records.signature,
            },
        )


def factorize(
    run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None
) -> Summary:
    """Fit non-negative coefficients and components to the stored Fishers."""
    with open_stage(run, "factorize", after="fishers") as stage:
        if stage.done:
            return stage.done
        progress, config, wanted = progress or SilentProgress(), run.config, run.config.factorization
        fishers, checksums, n_fit = record_of(run, "fishers"), _checksums(run), _count_fit_examples(run)
        _validate_size(config, n_fit, fishers["rank"])
        worker = worker_spec(
            run,
            SolverWorker,
            paths=SolverPaths(run.fishers, run.table("examples")),
            options=SolverOptions(
                n_components=wanted.n_components,
                max_iterations=wanted.max_iterations,
                tolerance=wanted.tolerance,
                n_starts=wanted.n_starts,
                subsample=wanted.subsample,
                seed=config.seed,
            ),
            device=device_of(config),
            timeout_s=config.executor.timeout_s,
        )
        config_hash = config.signature("factorization", "seed") + fishers["signature"]
        with (
            executor_for(run, executor) as workers,
            progress.stage("factorize", wanted.max_iterations, "steps") as tick,
        ):
            solved = run_solver(
                workers,
                worker,
                CheckpointStore(run.checkpoints, config_hash=config_hash),
                checksums,
                checkpoint_every=wanted.checkpoint_every,
                on_iteration=lambda row: tick(row["iteration"], f"explained {row['explained']:.4f}"),
                on_event=progress.say,
            )
            tick(solved.history[-1]["iteration"], solved.stopped, last=True)
        summary = _write_solution(run, solved, n_fit)
        progress.say(
            f"explained {summary['explained']:.4f} of the fitted Fishers"
            + (f", {summary['explained_held_out']:.4f} of the held-out ones" if summary["explained_held_out"] else "")
            + f" ({solved.stopped} after {summary['n_iter']} steps)"
        )
        return stage.complete(summary)


def lift(run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None) -> Summary:
    """Lift the components from the sketch to directions in parameter space."""
    with open_stage(run, "lift", after="factorize") as stage:
        if stage.done:
            return stage.done
        progress, config = progress or SilentProgress(), run.config
        n_components = config.factorization.n_components
        layout = FisherStore.open(run.fishers).attrs["parameter_layout"]
        shapes = {name: tuple(shape) for name, shape in zip(layout["names"], layout["shapes"], strict=True)}
        n_parameters = sum(math.prod(shape) for shape in shapes.values())
        model = model_spec(run, _fingerprint(run))  # refused before anything is written where there is none
        results = run.partial_results("lift")
        if not run.directions.exists():
            run.reopen("lift")  # or a crash would leave a complete stage with an empty store
            shutil.rmtree(results, ignore_errors=True)  # of directions that somebody deleted
            DirectionStore.create(run.directions, n_components=n_components, shapes=shapes, attrs={})
        lifted = {component: read_json(path) for component, path in finished(results).items()}
        missing = [component for component in range(n_components) if component not in lifted]
        worker = worker_spec(
            run,
            LiftWorker,
            model=model,
            labels=label_spec(config),
            sketch=sketch_spec(config),
            paths=LiftPaths(run.fishers, run.factorization, run.table("examples"), run.directions, results),
            checksums=_checksums(run),
            batch_size=FisherStore.open(run.fishers).attrs["batch_size"],
        )
        with (
            progress.stage("lift", n_components, "directions", done=len(lifted)) as tick,
            executor_for(run, executor) as workers,
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
    with open_stage(run, "verify", after="lift") as stage:
        if stage.done:
            return stage.done
        progress, config, wanted = progress or SilentProgress(), run.config, run.config.verification
        n_components = config.factorization.n_components
        results = run.partial_results("verify")
        verified = {
            component: read_table(path, "verification").to_pylist() for component, path in finished(results).items()
        }
        worker = worker_spec(
            run,
            VerificationWorker,
            model=model_spec(run, _fingerprint(run)),
            paths=VerificationPaths(run.factorization, run.directions, run.table("examples"), results),
            n_top=wanted.top_examples,
            n_baseline=wanted.baseline_examples,
            target_kl=wanted.target_kl,
            seed=config.seed,
            batch_size=FisherStore.open(run.fishers).attrs["batch_size"],
        )
        missing = [component for component in range(n_components) if component not in verified]
        with (
            progress.stage("verify", n_components, "components", done=len(verified)) as tick,
            executor_for(run, executor) as workers,
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


def _inspect(run: RunDirectory, workers: Executor) -> TaskFacts:
    """Prepare the task on a worker and look at it; refuse what the later stages could not use."""
    wanted = run.config.fishers
    inspection = worker_spec(run, TaskWorker, model=model_spec(run, None), labels=label_spec(run.config))
    facts: TaskFacts = next(iter(workers.map(inspection, "inspect", [inspection_of(run.config)])))[1]
    n_examples = len(facts.examples)
    n_fit = n_examples - int(run.config.factorization.held_out_fraction * n_examples)
    _validate_size(run.config, n_fit, facts.rank)
    if (wanted.diagonal.top_entries or 0) > facts.layout.size:
        raise ConfigError(
            f"fishers.diagonal.top_entries = {wanted.diagonal.top_entries} must be at most {facts.layout.size}, the "
            "number of parameter entries"
        )
    return facts


def _open_fishers(run: RunDirectory, facts: TaskFacts) -> tuple[ShardRecords, FisherStore]:
    """``fishers.zarr`` and its completion records; laid out now, unless an interrupted run has done it."""
    config = run.config
    signature = f"{config.signature('task', 'parameters', 'fishers', 'seed')}-{facts.model_fingerprint[:16]}"
    records = ShardRecords(run.shard_records, signature)
    if run.fishers.exists():
        there = FisherStore.open(run.fishers)
        laid_out = (there.plan.n_examples, there.n_classes, there.dim)
        if laid_out != (len(facts.examples), facts.n_classes, facts.sketch_dim):
            raise StoreError(
                f"{run.fishers} was laid out for {laid_out[0]} examples, {laid_out[1]} classes and sketch dimension "
                f"{laid_out[2]}, and the task has {len(facts.examples)}, {facts.n_classes} and {facts.sketch_dim} now: "
                "give it the former data and model, or choose another run_dir"
            )
        return records, there
    for former in (run.shard_records, run.partial_results("diagonal")):  # of Fishers that somebody deleted
        shutil.rmtree(former, ignore_errors=True)
    run.diagonal_fisher.unlink(missing_ok=True)
    store = FisherStore.create(
        run.fishers,
        n_examples=len(facts.examples),
        rank=facts.rank,
        dim=facts.sketch_dim,
        n_classes=facts.n_classes,
        shard_size=config.fishers.shard_size,
        store_dtype=config.fishers.store_dtype,
        attrs={
            "labels": label_spec(config).to_json(),
            "batch_size": facts.batch_size,
            "parameter_layout": facts.layout.to_json(),
            **({"diagonal_groups": facts.groups} if config.fishers.diagonal.groups else {}),
            "sketch": sketch_spec(config).to_json(),
            "model_fingerprint": facts.model_fingerprint,
        },
        with_logits=facts.with_logits,
        top_entries=config.fishers.diagonal.top_entries,
        n_groups=facts.n_groups if config.fishers.diagonal.groups else None,
    )
    return records, store


def _count_fit_examples(run: RunDirectory) -> int:
    """Examples that the components are fitted on.

    Raises:
        InvalidProblemError: there is nothing in them to factorize.
    """
    examples = read_table(run.table("examples"), "examples")
    n_fit = int((examples["valid"].to_numpy() & (np.asarray(examples["split"].to_pylist()) == "fit")).sum())
    if n_fit == 0:
        raise InvalidProblemError(
            "none of the examples that the components are to be fitted on has finite logits and gradients: look for "
            "NaN in the examples, or give more of them"
        )
    if not bool(examples.filter(examples["valid"])["fisher_norm"].to_numpy().any()):
        raise InvalidProblemError(
            "the Fishers of all examples are zero: the selected parameters do not change the logits, or the model is "
            "certain of every prediction"
        )
    return n_fit


def _write_solution(run: RunDirectory, solved: SolverRun, n_fit: int) -> Summary:
    """Everything that the solver's workers found, on disk; what is worth saying of it."""
    result = solved.results[0]
    coefficients = {shard: rows for part in solved.results for shard, rows in part.coefficients.items()}
    coefficients_NK = np.concatenate([coefficients[shard] for shard in sorted(coefficients)])
    summary = {
        "n_components": len(result.components_KD),
        "loss": result.loss,
        "explained": result.explained,
        "explained_held_out": result.explained_held_out,
        "n_iter": solved.history[-1]["iteration"],
        "stopped": solved.stopped,
        "n_fit": n_fit,
        "near_duplicates": near_duplicates(torch.tensor(result.components_KD)),
    }
    run.reopen("factorize")
    for stage in ("lift", "verify"):  # which are of the components that were there before, if there were any
        run.reopen(stage)
        shutil.rmtree(run.partial_results(stage), ignore_errors=True)
    shutil.rmtree(run.directions, ignore_errors=True)
    write_factorization(run.factorization, result.components_KD, coefficients_NK, summary)
    write_component_tables(run, result.components_KD, coefficients_NK)
    write_table(run.table("history"), "history", rows_to_columns(solved.history, "history"))
    return summary


def _validate_size(config: RunConfig, n_fit: int, rank: int) -> None:
    wanted = config.factorization
    validate_size(n_fit, rank, wanted.n_components)
    if wanted.subsample * rank < wanted.n_components:
        raise InvalidProblemError(
            f"factorization.subsample={wanted.subsample} examples of rank {rank} cannot start n_components="
            f"{wanted.n_components} components: set it to {math.ceil(wanted.n_components / rank)} or more"
        )


def _fingerprint(run: RunDirectory) -> str:
    """Of the model that the stored Fishers are of."""
    return str(FisherStore.open(run.fishers).attrs["model_fingerprint"])


def _checksums(run: RunDirectory) -> dict[int, str]:
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


def _spans(missing: list[int], workers: int) -> list[tuple[int, ...]]:
    """Shards for one call of a worker: a few, so that it writes one while it computes the next, yet a share for all."""
    size = max(1, min(_MOST_SHARDS_PER_CALL, len(missing) // (4 * workers)))
    return [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]


def _blocks(run: RunDirectory, missing: list[int], n_parameters: int, workers: int) -> list[tuple[int, ...]]:
    """Components to lift in one pass: as many as the memory limit allows, yet a share for every worker."""
    direction_bytes = 4 * n_parameters
    fitting = max(1, run.config.lift.memory_limit_mb * 2**20 // direction_bytes)
    size = max(1, min(fitting, math.ceil(len(missing) / workers)))
    return [tuple(missing[first : first + size]) for first in range(0, len(missing), size)]
