"""The stage `transform`: coefficients of this run's examples for the components of another run."""

from __future__ import annotations

from pathlib import Path

import torch

from npeff.execution.executor import Executor
from npeff.factorization import InvalidProblemError, explained, near_duplicates
from npeff.runs.definition import Summary
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import open_stage, record_of
from npeff.stages.earlier_results import checksums_of, components_of
from npeff.stages.factorize import FACTORIZE
from npeff.stages.factorize.solution import own_examples, write_solution
from npeff.stages.fishers.stage import compute_fishers
from npeff.stages.fishers.tables import ensure_split
from npeff.stages.transform.shards import over_shards
from npeff.stages.transform.worker import ShardCoefficients
from npeff.stages.worker_specs import executor_for
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
    progress, config = progress or SilentProgress(), run.config
    given = source if isinstance(source, RunDirectory) else RunDirectory.open(source)  # raises before any computation
    record_of(given, FACTORIZE)
    if (wanted := config.factorization.n_components) != given.config.factorization.n_components:
        raise InvalidProblemError(
            f"{given.path} has {given.config.factorization.n_components} components, and the new run has "
            f"factorization.n_components: {wanted}: set it to the number of components of {given.path}"
        )
    with run.lock(), executor_for(run, executor) as workers:
        compute_fishers(run, executor=workers, progress=progress)
        components_KD = components_of(run, given)
        if len(components_KD) != config.factorization.n_components:
            raise InvalidProblemError(
                f"{given.path} has {len(components_KD)} components: set factorization.n_components of the new run to "
                f"{len(components_KD)}"
            )
        origin = str(given.path if given.name == DEFAULT else given.home)
        with open_stage(run, FACTORIZE) as stage:
            there = record_of(given, FACTORIZE).get("lineage")
            sources = None if stage.made_from is None or there is None else stage.made_from | {"source": there}
            same_source = stage.done is not None and stage.done.get("transformed_from") == origin
            if stage.done and same_source:
                if sources is None or stage.done.get("made_from", sources) == sources:
                    return stage.done
                progress.say(f"the components of {given.path} have changed; computing the coefficients again")
            elif stage.done or run.checkpoints.exists():
                raise RunDirectoryError(
                    f"{run.path} has been factorized already",
                    "set another factorization.name, or use --name NAME",
                )
            ensure_split(run)
            checksums = checksums_of(run)
            in_order: list[ShardCoefficients] = over_shards(
                run,
                workers,
                progress,
                "transform",
                checksums,
                components_KD,
                l1=config.factorization.l1,
                title="transform",
            )
            loss = sum(float(part.losses_N.sum()) for part in in_order)
            total = sum(float(part.squares_N.sum()) for part in in_order)
            if not total > 0:
                raise InvalidProblemError("no example has a valid, nonzero Fisher: check the examples and the model")
            summary = {
                "n_components": len(components_KD),
                "loss": loss,
                "explained": explained(loss, total),
                "explained_held_out": None,
                "n_iter": 0,
                "stopped": "transformed",
                "transformed_from": origin,
                "near_duplicates": near_duplicates(torch.from_numpy(components_KD)),
            }
            coefficients_NK = StackedRows([part.coefficients_NK for part in in_order])
            evidence_NK = StackedRows([part.evidence_NK for part in in_order])
            summary |= write_solution(
                run, components_KD, coefficients_NK, [], summary, sources=sources, evidence_NK=evidence_NK
            )
            progress.say(f"explained {summary['explained']:.4f} of the Fishers")
            return stage.complete(summary | own_examples(run))
