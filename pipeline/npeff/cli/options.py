"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from npeff.storage.location import location

if TYPE_CHECKING:
    from npeff.runs.config import RunConfig
    from npeff.runs.directory import RunDirectory
    from npeff.runs.progress import ProgressDisplay

Run = Annotated[
    Path,
    typer.Argument(parser=location, metavar="RUN", help="A run file (YAML), or the directory of an existing run."),
]


RunFile = Annotated[Path, typer.Argument(parser=location, metavar="RUN", help="A run file (YAML).")]


ExistingRun = Annotated[Path, typer.Argument(parser=location, metavar="RUN_DIR", help="Directory of a run.")]


RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        parser=location,
        metavar="RUN_DIR",
        help="Directory of the run; overrides run_dir of the run file.",
    ),
]


Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Number of workers; overrides the run file. Several workers need Ray."),
]


Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster (local, auto or host:port); overrides the run file.")
]


MaxIterations = Annotated[
    int | None,
    typer.Option(
        "--max-iterations", min=1, help="New, larger limit on the iterations. A finished factorization is continued."
    ),
]


def open_run(
    run: Path,
    run_dir: Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    max_iterations: int | None = None,
) -> RunDirectory:
    """Return the run of a run file or a run directory, with the options of the command line applied."""
    from npeff.runs.config import RunConfig
    from npeff.runs.directory import RunDirectory

    if run.is_dir():
        if run_dir is not None:
            raise typer.BadParameter("--run-dir needs a run file, not the directory of a run")
        opened = RunDirectory.open(run)
        if max_iterations is not None:
            opened = RunDirectory.create(opened.config.with_max_iterations(max_iterations))
        return RunDirectory(opened.path, replaced(opened.config, workers, address))
    config = RunConfig.from_yaml(run)
    if run_dir is not None:
        config = config.model_copy(update={"run_dir": str(run_dir)})
    if max_iterations is not None:
        config = config.with_max_iterations(max_iterations)
    return RunDirectory.create(replaced(config, workers, address))


def replaced(config: RunConfig, workers: int | None, address: str | None) -> RunConfig:
    """Return the configuration with ``executor.workers`` and ``executor.address`` replaced where they are given."""
    changes = {"workers": workers, "address": address}
    return config.with_executor(**{name: value for name, value in changes.items() if value is not None})


def progress_of(run: RunDirectory) -> ProgressDisplay:
    """Return a display of a run's progress that also updates the metrics of a Ray cluster."""
    from npeff.execution.ray.metrics import RunMetrics
    from npeff.runs.progress import ObservedProgress, default_progress

    return ObservedProgress(default_progress(), RunMetrics(str(run.path)))
