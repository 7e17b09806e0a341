"""Beside the stages: is everything in a run directory what was written there? And the way back, if it is not.

The stages find damage when they read something; this reads everything. What is damaged is deleted, with the record that
vouched for it, and nothing else: for the stages it is then not there yet, and they make it again as after a crash.
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
"""What is stored in an array can only be verified once its metadata are there: a later round finds more."""
_MOST_AT_ONCE = 4
"""Parts that are read at a time; each is held in memory, whole."""


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong."""

    what: str
    where: Path
    why: str
    remedy: str


def check(
    run: RunDirectory,
    *,
    repair: bool = False,
    executor: Executor | None = None,
    progress: ProgressDisplay | None = None,
) -> list[Damage]:
    """Verify all that is in a run's directory; what is wrong with it, or, after a repair, what still is.

    Args:
        repair: delete what is damaged, and have the stages that were complete make it again.

    Raises:
        RunDirectoryError: the run is in use.
    """
    progress = progress or SilentProgress()
    with run.lock():
        damaged = _damaged(run, progress)
        if repair:
            stages, as_lifted, reported = _recomputations(run), _as_lifted(run), run.report.exists()
            for _ in range(_ROUNDS):
                mendable = [part for part, _ in damaged if part.mendable]
                if not mendable:
                    break
                _make_again(as_lifted, mendable, stages, reported, executor, progress)
                damaged = _damaged(run, progress)
        return [Damage(part.what, part.where, why, _remedy(run, part)) for part, why in damaged]


def _damaged(run: RunDirectory, progress: ProgressDisplay) -> list[tuple[Part, str]]:
    """The parts that cannot be read, and why."""
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
    """What recomputes each stage that was complete. Components of another run are taken from that run again."""
    imported = imported_stages(run)
    stages: dict[StageDefinition, Callable[..., object]] = {
        stage: stage for stage in complete_stages(run) if stage not in imported
    }
    if FACTORIZE in stages and (source := transformed_from(run)) is not None:
        stages[FACTORIZE] = partial(TRANSFORM, source=source)
    return stages


def _as_lifted(run: RunDirectory) -> RunDirectory:
    """The run, asked for just the components that it has directions of: the command line may have chosen them. Polished
    ones are all of them."""
    lifted = tuple(finished_components(run, "lift"))
    if not lifted or run.config.lift.polish_steps:
        return run
    return RunDirectory(run.path, run.config.with_lift(components=lifted))


def _make_again(
    run: RunDirectory,
    parts: Iterable[Part],
    stages: Mapping[StageDefinition, Callable[..., object]],
    reported: bool,
    executor: Executor | None,
    progress: ProgressDisplay,
) -> None:
    for part in parts:
        progress.say(f"making again: {part.what}")
        for path in part.deleted:
            delete(path)
    RunDirectory.create(run.config)  # the provenance, if that is gone
    with executor_for(run, executor) as workers:
        for stage, recompute in stages.items():
            if recorded(run, stage) is None:
                recompute(run, executor=workers, progress=progress)
    if reported:
        try:
            write_report(run.path, top_examples=run.config.report.top_examples)
        except QueryError as error:  # a table is damaged that this round could not make again
            progress.say(str(error))


def _remedy(run: RunDirectory, part: Part) -> str:
    return f"npeff check --repair {run.path}" if part.mendable else part.remedy
