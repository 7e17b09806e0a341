"""Stage 2: the Fishers into components and coefficients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.factorization import InvalidProblemError, SolverOptions, near_duplicates
from pipeline.metrics import metrics_writer
from pipeline.progress import ProgressDisplay, SilentProgress
from pipeline.result_tables import (
    rows_to_columns,
    write_component_tables,
)
from pipeline.run_directory import RunDirectory
from pipeline.runtime.diagonal_solver_actor import DiagonalSolverWorker
from pipeline.runtime.executor import Executor
from pipeline.runtime.solver_actor import Origin, SolverWorker
from pipeline.runtime.solver_driver import SolverRun, run_solver
from pipeline.stage import (
    Summary,
    checksums_of,
    components_of,
    device_of,
    executor_for,
    fitted_examples,
    open_stage,
    outputs_of,
    record_of,
    validate_problem,
    worker_spec,
)
from pipeline.stages.stability import component_stability
from pipeline.store import (
    CheckpointStore,
    Coefficients,
    Splits,
    StackedRows,
    StoreError,
    factorization_checksums,
    open_factorization,
    read_table,
    remove_directory,
    write_factorization,
    write_table,
)

_AFTER = ("lift", "verify", "attribute", "repair")
"""Stages that go on from the components."""


def factorize(
    run: RunDirectory, *, executor: Executor | None = None, progress: ProgressDisplay | None = None
) -> Summary:
    """Fit non-negative coefficients and components to the stored Fishers."""
    with open_stage(run, "factorize", after="fishers") as stage:
        if stage.done:
            return stage.done
        progress, config, wanted = progress or SilentProgress(), run.config, run.config.factorization
        fishers, checksums, n_fit = record_of(run, "fishers"), checksums_of(run), count_fit_examples(run)
        diagonal = wanted.kind != "fishers"
        validate_problem(config, n_fit, fishers["rank"])
        origin, metrics = _origin(run), metrics_writer(run.path / "metrics", wanted.metrics)
        limit = wanted.memory_limit_mb * 2**20
        worker = worker_spec(
            run,
            DiagonalSolverWorker if diagonal else SolverWorker,
            **({"kind": wanted.kind} if diagonal else {"origin": origin, "memory_limit_bytes": limit}),
            examples=fitted_examples(run),
            options=SolverOptions(
                n_components=wanted.n_components,
                max_iterations=wanted.max_iterations,
                tolerance=wanted.tolerance,
                n_starts=wanted.n_starts,
                subsample=wanted.subsample,
                seed=config.seed,
                l1=wanted.l1,
                orthogonality=wanted.orthogonality,
                n_frozen=len(origin.components_KD) if origin is not None and origin.frozen else 0,
            ),
            device=device_of(config),
            timeout_s=config.executor.timeout_s,
        )
        config_hash = config.factorization_signature() + fishers["signature"]
        with executor_for(run, executor) as workers:
            with progress.stage("factorize", wanted.max_iterations, "steps") as tick:

                def on_iteration(row: dict[str, Any]) -> None:
                    metrics(row)
                    numbers = {"loss": row["loss"], "explained": row["explained"]}
                    tick(row["iteration"], f"explained {row['explained']:.4f}", numbers=numbers)

                solved = run_solver(
                    workers,
                    worker,
                    CheckpointStore(run.checkpoints, config_hash=config_hash),
                    checksums,
                    checkpoint_every=wanted.checkpoint_every,
                    on_iteration=on_iteration,
                    on_event=progress.say,
                )
                tick(solved.history[-1]["iteration"], solved.stopped, last=True)
            stability_K = component_stability(run, workers, solved.results[0].components_KD, progress)
        summary = _write_solution(run, solved, n_fit, stability_K)
        progress.say(
            f"explained {summary['explained']:.4f} of the fitted {'diagonal ' if diagonal else ''}Fishers"
            + (f", {summary['explained_held_out']:.4f} of the held-out ones" if summary["explained_held_out"] else "")
            + f" ({solved.stopped} after {summary['n_iter']} steps)"
        )
        return stage.complete(summary)


def count_fit_examples(run: RunDirectory) -> int:
    """Examples that the components are fitted on.

    Raises:
        InvalidProblemError: there is nothing in them to factorize.
    """
    fitted = fitted_examples(run)
    examples, mispredicted_only = read_table(fitted.table, "examples"), fitted.mispredicted_only
    splits, weights_N = fitted.of(examples)
    fit_N = splits.fit_N
    n_fit = int((fit_N & (weights_N > 0)).sum())
    if n_fit == 0 and bool(fit_N.any()):
        raise InvalidProblemError(
            f"every example to fit on has weight zero: look at column {fitted.weight_column!r}, which "
            "factorization.example_weights names"
        )
    if n_fit == 0 and mispredicted_only and bool(Splits.of(examples).fit_N.any()):
        raise InvalidProblemError(
            "no example to fit on is known to be mispredicted: set factorization.examples: all, or give examples with "
            "labels"
        )
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


def _origin(run: RunDirectory) -> Origin | None:
    """The components of another run that this one starts from or expands.

    Raises:
        RunDirectoryError: they are of another space.
        InvalidProblemError: their number does not fit.
    """
    wanted = run.config.factorization
    if (other := wanted.start_from or wanted.expand) is None:
        return None
    components_KD = components_of(run, other)
    if wanted.start_from is not None and len(components_KD) != wanted.n_components:
        raise InvalidProblemError(
            f"{other} has {len(components_KD)} components: set factorization.n_components to that, or use "
            "factorization.expand to add some"
        )
    return Origin(components_KD, frozen=wanted.expand is not None)


def _write_solution(run: RunDirectory, solved: SolverRun, n_fit: int, stability_K: np.ndarray | None) -> Summary:
    """Everything that the solver's workers found, on disk; what is worth saying of it."""
    result = solved.results[0]
    coefficients = {shard: rows for part in solved.results for shard, rows in part.coefficients.items()}
    coefficients_NK = StackedRows([coefficients[shard] for shard in sorted(coefficients)])
    summary = {
        "n_components": len(result.components_KD),
        "factorized": run.config.factorization.kind,
        "loss": result.loss,
        "objective": result.objective,
        "explained": result.explained,
        "explained_held_out": result.explained_held_out,
        "n_iter": solved.history[-1]["iteration"],
        "stopped": solved.stopped,
        "n_fit": n_fit,
        "median_stability": None if stability_K is None else float(np.median(stability_K)),
        "near_duplicates": near_duplicates(torch.tensor(result.components_KD)),
    }
    return summary | write_solution(
        run, result.components_KD, coefficients_NK, solved.history, summary, stability_K, result.columns_D
    )


def write_solution(
    run: RunDirectory,
    components_KD: NDArray[np.float64],
    coefficients_NK: Coefficients,
    history: list[dict[str, Any]],
    summary: Summary,
    stability_K: np.ndarray | None = None,
    columns_D: np.ndarray | None = None,
) -> Summary:
    """Components and coefficients on disk, and their tables; what the stage's record is to say of them.

    What followed from former components is taken away, unless these are the same, made again because a file of them
    was damaged.
    """
    checksums = factorization_checksums(components_KD, coefficients_NK, columns_D)
    if _former_checksums(run) == checksums:
        run.reopen("lift")  # which adds to the table of components; its directions stay
    else:
        for stage in ("factorize", *_AFTER):
            run.reopen(stage)
            remove_directory(run.partial_results(stage))
        for stage in _AFTER:
            for table in (output for output in outputs_of(run, stage) if output.suffix == ".parquet"):
                table.unlink(missing_ok=True)  # or the report would show them beside the new components
        for folder in (run.directions, run.repaired):
            remove_directory(folder)
    write_factorization(run.factorization, components_KD, coefficients_NK, summary, columns_D)
    write_component_tables(run, components_KD, coefficients_NK, stability_K)
    write_table(run.table("history"), "history", rows_to_columns(history, "history"))
    return {"checksums": checksums}


def _former_checksums(run: RunDirectory) -> dict[str, str] | None:
    """Of the components that the later stages went on from, as far as that is known."""
    try:
        checksums: dict[str, str] = open_factorization(run.factorization).attrs["checksums"]
        return checksums
    except StoreError:  # it is gone, or damaged
        record = run.record("factorize")
        return None if record is None else record.get("checksums")
