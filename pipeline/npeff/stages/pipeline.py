"""All stages in order, the report, and the export of directions.

Each stage takes a run directory, resumes from the results in it, and returns its record when it is complete. All stages
can be called again after any crash.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from npeff.reports.report import write_report
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import ProgressDisplay
from npeff.runs.stage import record_of, recorded, refuse_foreign_results
from npeff.stages.earlier_results import direction_checksums, lifted_components
from npeff.stages.fishers import FISHERS
from npeff.stages.lift import LIFT
from npeff.stages.registry import STAGES
from npeff.stages.validation import validate_for_workers
from npeff.stages.worker_specs import executor_for, model_executor_for
from npeff.store.annotations import read_annotations
from npeff.store.direction_store import DirectionStore


def run(config: RunConfig | RunDirectory, *, progress: ProgressDisplay | None = None) -> RunDirectory:
    """Run every stage in order and write the report. Results that are already complete are not recomputed.

    Args:
        config: the configuration of a run, whose directory is created or resumed, or an open run directory.
        progress: display for the progress. No progress is shown if None.

    Returns:
        The run directory.

    Raises:
        NpeffError: a stage cannot be completed. The message is one line with the cause and the remedy.
    """
    directory = config if isinstance(config, RunDirectory) else RunDirectory.create(config, validate_for_workers)
    stages = [stage for stage in STAGES if stage.in_run(directory.config)]
    if progress is not None:
        progress.say(f"run {directory.path}")
    unfinished = [stage for stage in stages if recorded(directory, stage) is None]
    start = model_executor_for if FISHERS in unfinished else executor_for
    with directory.lock():
        # Workers are started once for all stages, and only if a stage is unfinished.
        with start(directory, None) if unfinished else nullcontext() as executor:
            for stage in stages:
                stage(directory, executor=executor, progress=progress)
        report(directory, progress=progress)
    return directory


def report(run: RunDirectory, *, progress: ProgressDisplay | None = None) -> Path:
    """Write the report, one HTML file, from the available results. Returns its path."""
    with run.lock():
        return write_report(run.path, factorization=run.name, **run.config.report.arguments())


def export_direction(run: RunDirectory, component: int, file: str | Path) -> None:
    """Write a component's unit direction to a safetensors file, one tensor per parameter name.

    The metadata of the file contain the name and the note of the component, if it has any.

    Raises:
        RunDirectoryError: the component does not exist or is not lifted.
    """
    directions, known = _lifted_directions(run, component), read_annotations(run)
    texts = {"name": known.name(component), "note": known.note(component)}
    directions.export(component, file, {key: text for key, text in texts.items() if text is not None})


def stored_direction(run: RunDirectory, component: int) -> dict[str, NDArray[Any]]:
    """Return a component's unit direction by parameter. Raises as `export_direction`."""
    return _lifted_directions(run, component).read(component)


def _lifted_directions(run: RunDirectory, component: int) -> DirectionStore:
    """Return the directions, after a check that they contain this component."""
    record_of(run, LIFT)
    refuse_foreign_results(run, LIFT)
    directions = DirectionStore.open(run.directions, direction_checksums(run))
    if component >= directions.n_components:
        raise RunDirectoryError(
            f"{run.path} has no component {component}: choose one of 0 to {directions.n_components - 1}"
        )
    if component not in lifted_components(run):
        raise RunDirectoryError(
            f"component {component} is not lifted: run `npeff lift {run.argument} -c {component}` first"
        )
    return directions
