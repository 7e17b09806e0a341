"""Every stage in order, and what is done with a finished run.

Each stage takes a run directory, resumes from what is in it, and returns what it has recorded when it is complete. All
stages may be called again after any crash.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from npeff.reports.report import write_report
from npeff.reports.serve import serve
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import ProgressDisplay
from npeff.runs.stage import record_of, recorded
from npeff.stages.inputs import lifted_components
from npeff.stages.lift import LIFT
from npeff.stages.registry import STAGES
from npeff.stages.worker_specs import executor_for
from npeff.store.direction_store import DirectionStore


def run(config: RunConfig | RunDirectory, *, progress: ProgressDisplay | None = None) -> RunDirectory:
    """Run every stage in order, and write the report. What is complete already is not computed again.

    Args:
        config: the configuration of a run, whose directory is created or resumed, or an open run directory.
        progress: where to show progress; nowhere unless given.

    Returns:
        The run directory.

    Raises:
        NpeffError: a stage cannot be completed; the message is one line that says why and what to do.
    """
    directory = config if isinstance(config, RunDirectory) else RunDirectory.create(config)
    stages = [stage for stage in STAGES if stage.in_every_run]
    if progress is not None:
        progress.say(f"run {directory.path}")
    unfinished = any(recorded(directory, stage) is None for stage in stages)
    with directory.lock():
        # Workers are started once for all stages, and not at all where there is nothing to do.
        with executor_for(directory, None) if unfinished else nullcontext() as executor:
            for stage in stages:
                stage(directory, executor=executor, progress=progress)
        report(directory, progress=progress)
    return directory


def report(run: RunDirectory, *, progress: ProgressDisplay | None = None) -> Path:
    """Write the report, one HTML file, from whatever is there."""
    with run.lock():
        return write_report(run.path, top_examples=run.config.report.top_examples)


def serve_report(run: RunDirectory, port: int, say: Callable[[str], None]) -> None:
    """Serve the report, and a view to query the run in, on this machine only, until Ctrl-C. Nothing is written."""
    serve(run.path, port, run.config.report.top_examples, say)


def export_direction(run: RunDirectory, component: int, file: str | Path) -> None:
    """Write a component's unit direction as a safetensors file under the parameters' names."""
    record_of(run, LIFT)
    directions = DirectionStore.open(run.directions)
    if component >= directions.n_components:
        raise RunDirectoryError(f"{run.path} has components 0 to {directions.n_components - 1}, no {component}")
    if component not in lifted_components(run):
        raise RunDirectoryError(
            f"component {component} is not lifted: run `npeff lift {run.path} -c {component}` first"
        )
    directions.export(component, file)
