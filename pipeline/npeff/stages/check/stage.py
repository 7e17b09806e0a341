"""Verification of a whole run directory, and recomputation of its damaged parts.

A stage finds damage only in the files that it reads. `check` reads every file. With ``recompute``, it deletes only the
damaged parts and their records. The stages then recompute the deleted parts, as they do after a crash.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from npeff.execution.executor import Executor
from npeff.query.errors import QueryError
from npeff.reports.report import write_report
from npeff.runs.definition import StageDefinition
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.part import Part, delete, finished_components
from npeff.runs.progress import ProgressDisplay, SilentProgress
from npeff.runs.stage import recorded
from npeff.stages.check.parts import complete_stages, imported_stages, parts_of
from npeff.stages.factorize import FACTORIZE
from npeff.stages.factorize.parts import transformed_from
from npeff.stages.transform import TRANSFORM
from npeff.stages.worker_specs import executor_for
from npeff.storage.errors import StoreError

_ROUNDS = 3
"""The content of an array can be verified only after its metadata are restored, so a later round may find more."""
_MOST_AT_ONCE = 4
"""Largest number of parts that are read at a time. Each part is held in memory as a whole."""


@dataclass(frozen=True)
class Damage:
    """One damaged part of a run directory."""

    what: str
    where: Path
    why: str
    remedy: str


def check(
    run: RunDirectory,
    *,
    recompute: bool = False,
    executor: Executor | None = None,
    progress: ProgressDisplay | None = None,
) -> list[Damage]:
    """Verify everything in a run directory.

    Args:
        run: The run directory.
        recompute: Delete the damaged parts, and recompute those of stages that were complete.
        executor: Distributes the recomputation; by default, the executor of the run file.
        progress: Display of the progress; by default, none.

    Returns:
        The damaged parts; with ``recompute``, the parts that are still damaged afterwards.

    Raises:
        RunDirectoryError: the run is in use.
    """
    progress = progress or SilentProgress()
    with run.lock():
        damaged = _damaged(run, progress)
        if recompute:
            stages, as_lifted, reported = _recomputations(run), _as_lifted(run), run.report.exists()
            for _ in range(_ROUNDS):
                recomputable = [part for part, _ in damaged if part.recomputable]
                if not recomputable:
                    break
                _recompute(as_lifted, recomputable, stages, reported, executor, progress)
                damaged = _damaged(run, progress)
        return [Damage(part.what, part.where, why, _remedy(run, part)) for part, why in damaged]


def _damaged(run: RunDirectory, progress: ProgressDisplay) -> list[tuple[Part, str]]:
    """Return the damaged parts, each with a description of its damage."""
    parts, found = parts_of(run), []
    with (
        progress.stage("check", len(parts), "parts") as tick,
        ThreadPoolExecutor(min(_MOST_AT_ONCE, os.cpu_count() or 1), "check") as readers,
    ):
        for done, (part, why) in enumerate(zip(parts, readers.map(_verified, parts), strict=True), start=1):
            if why is not None:
                found.append((part, why))
            tick(done, f"{len(found)} damaged" if found else "")
    return found


def _verified(part: Part) -> str | None:
    try:
        part.verify()
    except (StoreError, RunDirectoryError) as error:
        return error.problem
    return None


def _recomputations(run: RunDirectory) -> dict[StageDefinition, Callable[..., object]]:
    """Return a function that recomputes the stage, for each complete stage.

    Components that were taken from another run are read from that run again.
    """
    imported = imported_stages(run)
    stages: dict[StageDefinition, Callable[..., object]] = {
        stage: stage for stage in complete_stages(run) if stage not in imported
    }
    if FACTORIZE in stages and (source := transformed_from(run)) is not None:
        stages[FACTORIZE] = partial(TRANSFORM, source=source)
    return stages


def _as_lifted(run: RunDirectory) -> RunDirectory:
    """Return the run, configured to lift only the components that have directions.

    These components may have been chosen on the command line. Polishing always lifts all components.
    """
    lifted = tuple(finished_components(run, "lift"))
    if not lifted or run.config.lift.polish_steps:
        return run
    return RunDirectory(run.path, run.config.with_lift(components=lifted))


def _recompute(
    run: RunDirectory,
    parts: Iterable[Part],
    stages: Mapping[StageDefinition, Callable[..., object]],
    reported: bool,
    executor: Executor | None,
    progress: ProgressDisplay,
) -> None:
    for part in parts:
        progress.say(f"recomputing: {part.what}")
        for path in part.deleted:
            delete(path)
    RunDirectory.create(run.config)  # writes the provenance file if it is missing
    with executor_for(run, executor) as workers:
        for stage, recompute in stages.items():
            if recorded(run, stage) is None:
                recompute(run, executor=workers, progress=progress)
    if reported:
        try:
            write_report(run.path, top_examples=run.config.report.top_examples)
        except QueryError as error:  # this round could not recompute a damaged table
            progress.say(str(error))


def _remedy(run: RunDirectory, part: Part) -> str:
    return f"npeff check --recompute {run.path}" if part.recomputable else part.remedy
