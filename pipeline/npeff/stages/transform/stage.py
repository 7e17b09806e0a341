"""The stage `transform`: coefficients of this run's examples for the components of another run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.execution.executor import Executor
from npeff.factorization import InvalidProblemError, explained, near_duplicates
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import open_stage, record_of, recorded
from npeff.stages.earlier_results import checksums_of, components_of
from npeff.stages.factorize import FACTORIZE
from npeff.stages.factorize.solution import own_examples, write_solution
from npeff.stages.fishers import FISHERS
from npeff.stages.fishers.stage import compute_fishers
from npeff.stages.fishers.tables import ensure_split
from npeff.stages.transform.shards import over_shards
from npeff.stages.transform.worker import ShardCoefficients
from npeff.stages.worker_specs import executor_for, model_executor_for
from npeff.storage.commands import DEFAULT
from npeff.store.coefficient_rows import StackedRows


def transform(
    run: RunDirectory,
    source: str | Path | RunDirectory,
    *,
    executor: Executor | None = None,
    progress: ProgressDisplay | None = None,
) -> Summary:
    """Compute coefficients of a run's examples for the components of another run, which are copied into the run.

    Missing Fishers are computed first. The run can then be queried and reported like any other run.

    Args:
        run: the run with the new examples.
        source: the run with the components, or its path.
        executor: executor for the work. A new one is created if None.
        progress: display for the progress. No progress is shown if None.

    Returns:
        The record of the stage.

    Raises:
        RunDirectoryError: the model, parameters, sketch or seed of the runs differ, or the run has been factorized.
        InvalidProblemError: ``factorization.n_components`` of the run is not the number of components.
    """
    progress = progress or SilentProgress()
    given = source if isinstance(source, RunDirectory) else RunDirectory.open(source)  # raises before any computation
    record_of(given, FACTORIZE)
    _refuse_another_number(run, given, given.config.factorization.n_components)
    start = model_executor_for if recorded(run, FISHERS) is None else executor_for
    with run.lock(), start(run, executor) as workers:
        compute_fishers(run, executor=workers, progress=progress)
        components_KD = components_of(run, given)
        _refuse_another_number(run, given, len(components_KD))
        origin = str(given.path if given.name == DEFAULT else given.home)
        with open_stage(run, FACTORIZE) as stage:
            there = record_of(given, FACTORIZE).get("lineage")
            sources = None if stage.made_from is None or there is None else stage.made_from | {"source": there}
            if stage.done and stage.done.get("transformed_from") == origin:
                if sources is None or stage.done.get("made_from", sources) == sources:
                    return stage.done
                progress.say(f"the components of {given.path} have changed; computing the coefficients again")
            elif stage.done or run.checkpoints.exists():
                raise RunDirectoryError(
                    f"{run.path} has been factorized already",
                    "set another factorization.name, or use --name NAME",
                )
            ensure_split(run)
            in_order: list[ShardCoefficients] = over_shards(
                run,
                workers,
                progress,
                "transform",
                checksums_of(run),
                components_KD,
                l1=run.config.factorization.l1,
                title="transform",
            )
            summary = _summary(in_order, components_KD) | {"transformed_from": origin}
            coefficients_NK = StackedRows([part.coefficients_NK for part in in_order])
            evidence_NK = StackedRows([part.evidence_NK for part in in_order])
            summary |= write_solution(
                run, components_KD, coefficients_NK, [], summary, sources=sources, evidence_NK=evidence_NK
            )
            progress.say(f"explained {summary['explained']:.4f} of the Fishers")
            return stage.complete(summary | own_examples(run))


def _refuse_another_number(run: RunDirectory, given: RunDirectory, n_components: int) -> None:
    """Raise an error unless the settings of the run name this number of components."""
    if (wanted := run.config.factorization.n_components) != n_components:
        raise InvalidProblemError(
            f"{given.path} has {n_components} components, and the new run has factorization.n_components: {wanted}: "
            f"set it to the number of components of {given.path}"
        )


def _summary(in_order: Sequence[ShardCoefficients], components_KD: NDArray[np.float32]) -> Summary:
    """Return what the record says of the coefficients of all shards."""
    loss = sum(float(part.losses_N.sum()) for part in in_order)
    total = sum(float(part.squares_N.sum()) for part in in_order)
    if not total > 0:
        raise InvalidProblemError("no example has a valid, nonzero Fisher: check the examples and the model")
    return {
        "n_components": len(components_KD),
        "loss": loss,
        "explained": explained(loss, total),
        "explained_held_out": None,
        "n_iter": 0,
        "stopped": "transformed",
        "near_duplicates": near_duplicates(torch.from_numpy(components_KD)),
    }
