"""Stage 2: the Fishers into components and coefficients."""

from __future__ import annotations

import shutil

import numpy as np
import torch

from pipeline.factorization import InvalidProblemError, SolverOptions, near_duplicates
from pipeline.progress import ProgressDisplay, SilentProgress
from pipeline.result_tables import (
    rows_to_columns,
    write_component_tables,
)
from pipeline.run_directory import RunDirectory
from pipeline.runtime.diagonal_solver_actor import DiagonalSolverWorker
from pipeline.runtime.executor import Executor
from pipeline.runtime.solver_actor import SolverPaths, SolverWorker
from pipeline.runtime.solver_driver import SolverRun, run_solver
from pipeline.stage import (
    Summary,
    checksums_of,
    device_of,
    executor_for,
    open_stage,
    record_of,
    validate_problem,
    worker_spec,
)
from pipeline.store import (
    CheckpointStore,
    read_table,
    write_factorization,
    write_table,
)


def factorize(
    run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None
) -> Summary:
    """Fit non-negative coefficients and components to the stored Fishers."""
    with open_stage(run, "factorize", after="fishers") as stage:
        if stage.done:
            return stage.done
        progress, config, wanted = progress or SilentProgress(), run.config, run.config.factorization
        fishers, checksums, n_fit = record_of(run, "fishers"), checksums_of(run), _count_fit_examples(run)
        diagonal = wanted.kind != "fishers"
        validate_problem(config, n_fit, fishers["rank"])
        worker = worker_spec(
            run,
            DiagonalSolverWorker if diagonal else SolverWorker,
            **({"kind": wanted.kind} if diagonal else {}),
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
            f"explained {summary['explained']:.4f} of the fitted {'diagonal ' if diagonal else ''}Fishers"
            + (f", {summary['explained_held_out']:.4f} of the held-out ones" if summary["explained_held_out"] else "")
            + f" ({solved.stopped} after {summary['n_iter']} steps)"
        )
        return stage.complete(summary)


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
        "factorized": run.config.factorization.kind,
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
    write_factorization(run.factorization, result.components_KD, coefficients_NK, summary, result.columns_D)
    write_component_tables(run, result.components_KD, coefficients_NK)
    write_table(run.table("history"), "history", rows_to_columns(solved.history, "history"))
    return summary
