"""Verification of a whole run directory, and recomputation of its damaged parts.

A stage finds damage only in the files that it reads. `check` reads every file. With ``recompute``, it deletes only the
damaged parts and their records. The stages then recompute the deleted parts, as they do after a crash.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.part import Part, delete, finished_units, intact_record
from npeff.runs.progress import Progress, ProgressDisplay, display
from npeff.runs.settings import restore_provenance
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
    run: AnyRun,
    *,
    factorization: str | None = None,
    recompute: bool = False,
    executor: Executor | None = None,
    progress: Progress = "auto",
) -> list[Damage]:
    """Verify everything in a run directory.

    Args:
        run: The run, its configuration, or the path of its directory or run file.
        factorization: Verify only this factorization, and the run. The default is all factorizations.
        recompute: Delete the damaged parts, and recompute those of stages that were complete.
        executor: Distributes the recomputation; by default, the executor of the run file.
        progress: Display for the progress; see `npeff.runs.progress.display`.

    Returns:
        The damaged parts; with ``recompute``, the parts that are still damaged afterwards.

    Raises:
        RunDirectoryError: the run is in use.
    """
    run, progress = as_run(run), display(progress)
    with run.lock():
        names = [factorization] if factorization is not None else run.factorizations()
        runs = [run if name == run.name else run.with_factorization(name) for name in names] or [run]
        damaged = _damaged(runs, progress)
        if recompute:
            done = [_Done(_as_recorded(_as_lifted(each)), _recomputations(each), each.report.exists()) for each in runs]
            for _ in range(_ROUNDS):
                recomputable = [part for part, _ in damaged if part.recomputable]
                if not recomputable:
                    break
                _recompute(done, recomputable, executor, progress)
                damaged = _damaged(runs, progress)
        for each in runs:
            if unknown := [stage.name for stage in complete_stages(each) if _is_unknown(each, stage)]:
                progress.say(
                    f"{each.home}: what the results of {', '.join(unknown)} were made from is unknown; an earlier "
                    "version or an import wrote them"
                )
        return [Damage(part.what, part.where, why, _remedy(run, part)) for part, why in damaged]


def _is_unknown(run: RunDirectory, stage: StageDefinition) -> bool:
    return "lineage" not in (intact_record(run, stage.name) or {"lineage": None})


@dataclass(frozen=True)
class _Done:
    """What was complete of a factorization, and of the run, before the damaged parts were deleted."""

    run: RunDirectory
    stages: Mapping[StageDefinition, Callable[..., object]]
    reported: bool


def _damaged(runs: Sequence[RunDirectory], progress: ProgressDisplay) -> list[tuple[Part, str]]:
    """Return the damaged parts of a run and of its factorizations, each with a description of its damage."""
    parts = [part for first, run in enumerate(runs) for part in parts_of(run, of_the_run=first == 0)]
    found = []
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
    lifted = tuple(finished_units(run, "lift"))
    if not lifted or run.config.lift.polish_steps:
        return run
    return run.with_config(run.config.with_lift(components=lifted))


def _as_recorded(run: RunDirectory) -> RunDirectory:
    """Return the run, configured for the paths and the step of its records, which may have been chosen on the command
    line."""
    scale, step = ((intact_record(run, stage) or {}).get("settings") for stage in ("scale", "step"))
    config = run.config if scale is None else run.config.with_scale(**scale)
    return run.with_config(config if step is None else config.with_step(**step))


def _recompute(
    done: Sequence[_Done], parts: Iterable[Part], executor: Executor | None, progress: ProgressDisplay
) -> None:
    for part in parts:
        progress.say(f"recomputing: {part.what}")
        for path in part.deleted:
            delete(path)
    restore_provenance(done[0].run)
    with executor_for(done[0].run, executor) as workers:
        for each in done:
            for stage, recompute in each.stages.items():
                try:
                    complete = recorded(each.run, stage) is not None
                except RunDirectoryError as error:  # results that do not fit, which no stage may replace
                    progress.say(str(error))
                    break
                if not complete:
                    recompute(each.run, executor=workers, progress=progress)
    for each in done:
        if each.reported:
            run = each.run
            try:
                write_report(run.path, factorization=run.name, **run.config.report.arguments())
            except QueryError as error:  # this round could not recompute a damaged table
                progress.say(str(error))


def _remedy(run: RunDirectory, part: Part) -> str:
    return f"npeff check --recompute {run.path}" if part.recomputable else part.remedy
