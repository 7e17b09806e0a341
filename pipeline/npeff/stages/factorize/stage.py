"""The stage `factorize`: components and coefficients of the stored Fishers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.execution.executor import Executor
from npeff.factorization import InvalidProblemError, near_duplicates
from npeff.options.kinds import FACTORIZED
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.lineage import MadeFrom
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, ProgressDisplay, display
from npeff.runs.settings import refuse_fewer_iterations
from npeff.runs.stage import open_stage, record_of
from npeff.stages.earlier_results import checksums_of, components_of, count_fit_examples, validate_problem
from npeff.stages.factorize import FACTORIZE
from npeff.stages.factorize.driver import SolverRun, run_solver
from npeff.stages.factorize.found import Found, SketchedKinds, found_by_solver
from npeff.stages.factorize.live_history import history_written
from npeff.stages.factorize.solution import own_examples, write_solution
from npeff.stages.factorize.worker import Origin, SolverWorker
from npeff.stages.fishers import FISHERS
from npeff.stages.fishers.tables import ensure_split
from npeff.stages.fits.stability import component_stability
from npeff.stages.worker_specs import device_of, executor_for, fitted_examples, worker_spec
from npeff.storage.atomic import remove_directory
from npeff.store.checkpoint import CheckpointStore
from npeff.store.coefficient_rows import StackedRows
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums


def factorize(run: AnyRun, *, executor: Executor | None = None, progress: Progress = "auto") -> Summary:
    """Fit non-negative coefficients and components to the stored Fishers.

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
    with open_stage(run, FACTORIZE) as stage:
        refuse_fewer_iterations(run)
        if stage.done:
            return stage.done
        ensure_split(run)
        config, kind = run.config, run.config.factorization.kind
        fishers, checksums, n_fit = record_of(run, FISHERS), checksums_of(run), count_fit_examples(run)
        validate_problem(config, n_fit, fishers["rank"])
        folder = run.partial_results("solver")
        with executor_for(run, executor) as workers:
            sketched = SketchedKinds(run, workers, checksums, progress)
            if kind == "kmeans" or kind == "pca" or kind == "random":
                found = sketched.compute(kind)
            else:
                solved = _solve(run, workers, checksums, fishers["signature"], folder, progress)
                found = found_by_solver(solved, folder, FisherStore.open(run.fishers).plan)
            if kind == "gradients" or kind == "squared":
                found = sketched.in_the_sketch(found)
            stability_K = component_stability(run, workers, found.components_KD, progress)
        summary = _write(run, found, n_fit, stability_K, stage.made_from)
        remove_directory(folder)
        what, steps = FACTORIZED[kind], f" after {found.n_iter} steps" if found.n_iter else ""
        progress.say(
            f"explained {summary['explained']:.4f} of the fitted {what}"
            + (f", {summary['explained_held_out']:.4f} of the held-out ones" if summary["explained_held_out"] else "")
            + f" ({found.stopped}{steps})"
        )
        if found.stopped == "max_iterations":
            progress.say(
                "factorize: the loss still changed when it stopped; to continue: npeff factorize "
                f"{run.argument} --max-iterations {2 * found.n_iter}, then lift and verify"
            )
        return stage.complete(summary | own_examples(run))


def _solve(
    run: RunDirectory,
    workers: Executor,
    checksums: dict[int, ShardChecksums],
    fishers_signature: str,
    folder: Path,
    progress: ProgressDisplay,
) -> SolverRun:
    """Run the solver to the end."""
    config, wanted = run.config, run.config.factorization
    origin, title = _origin(run), f"{run.path.name}/{run.name}"
    n_frozen = len(origin.components_KD) if origin is not None and origin.frozen else 0
    worker = worker_spec(
        run,
        SolverWorker,
        kind=wanted.kind,
        origin=origin,
        memory_limit_bytes=wanted.memory_limit_mb * 2**20,
        examples=fitted_examples(run),
        options=wanted.solver_options(config.seed, n_frozen=n_frozen),
        device=device_of(config),
        timeout_s=config.executor.timeout_s,
    )
    with (
        history_written(run.metrics, wanted.metrics, title) as metrics,
        progress.stage("factorize", wanted.max_iterations, "steps") as tick,
    ):

        def on_iteration(row: dict[str, Any]) -> None:
            metrics(row)
            numbers = {"loss": row["loss"], "explained": row["explained"]}
            tick(row["iteration"], f"explained {row['explained']:.4f}", numbers=numbers)

        solved = run_solver(
            workers,
            worker,
            CheckpointStore(run.checkpoints, config_hash=config.factorization_signature() + fishers_signature),
            checksums,
            folder,
            checkpoint_every=wanted.checkpoint_every,
            on_iteration=on_iteration,
            on_event=progress.say,
        )
        tick(solved.history[-1]["iteration"], solved.stopped, last=True)
    return solved


def _origin(run: RunDirectory) -> Origin | None:
    """Return the components of another run that this run starts from or expands, or None.

    Raises:
        RunDirectoryError: the model, parameters, sketch or seed of the runs differ.
        InvalidProblemError: the number of components differs from ``factorization.n_components``.
    """
    wanted = run.config.factorization
    if wanted.start_from is None and wanted.expand is None:
        return None
    other = run.config.resolved("factorization.expand" if wanted.start_from is None else "factorization.start_from")
    components_KD = components_of(run, other)
    if wanted.start_from is not None and len(components_KD) != wanted.n_components:
        raise InvalidProblemError(
            f"{other} has {len(components_KD)} components: set factorization.n_components to {len(components_KD)}, or "
            "use factorization.expand to add components"
        )
    return Origin(components_KD, frozen=wanted.expand is not None)


def _write(
    run: RunDirectory, found: Found, n_fit: int, stability_K: np.ndarray | None, sources: MadeFrom | None
) -> Summary:
    """Write the results. Returns the summary for the stage's record."""
    summary = {
        "n_components": len(found.components_KD),
        "factorized": run.config.factorization.kind,
        "loss": found.loss,
        "objective": found.objective,
        "explained": found.explained,
        "explained_held_out": found.explained_held_out,
        "n_iter": found.n_iter,
        "stopped": found.stopped,
        "n_fit": n_fit,
        "median_stability": None if stability_K is None else float(np.median(stability_K)),
        "near_duplicates": near_duplicates(torch.tensor(found.components_KD)),
    }
    return summary | write_solution(
        run,
        found.components_KD,
        StackedRows(found.coefficients),
        found.history,
        summary,
        stability_K,
        found.columns_D,
        sources=sources,
        evidence_NK=None if found.evidence is None else StackedRows(found.evidence),
    )
