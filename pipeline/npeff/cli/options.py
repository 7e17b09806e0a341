"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from npeff.cli.output import OutputFormat
from npeff.storage.location import location
from npeff.variables import literal

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
    typer.Option("--max-iterations", min=1, help="New limit on the iterations. A finished factorization is continued."),
]


Factorization = Annotated[
    str | None,
    typer.Option(
        "--factorization",
        metavar="NAME",
        help="Factorization of the run to use. Default: factorization.name of the run file, or the first one.",
        show_default=False,
    ),
]


Format = Annotated[
    OutputFormat | None,
    typer.Option(
        "--format",
        help="Output format. Default: given by the extension of FILE, otherwise table, which leaves out columns that "
        "do not fit the terminal. expanded: every value, each on a line of its own. spreadsheet: CSV in which an "
        "apostrophe is put before texts that begin with = + - @, a tab or a line break, so that a spreadsheet does not "
        "evaluate them as formulas.",
        show_default=False,
    ),
]
File = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="Write the result to this file.")
]


Name = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Name under which the factorization is stored, beside the others."),
]


def open_run(
    run: Path,
    run_dir: Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    max_iterations: int | None = None,
    factorization: str | None = None,
    name: str | None = None,
    components: int | None = None,
    any_factorization: bool = False,
    kind: str | None = None,
) -> RunDirectory:
    """Return the run of a run file or a run directory, with the options of the command line applied.

    Args:
        run: A run file or a run directory.
        run_dir: As the option ``--run-dir``.
        workers: As the option ``--workers``.
        address: As the option ``--address``.
        max_iterations: As the option ``--max-iterations``.
        factorization: The factorization of the run that is used or, with ``name``, whose settings a new one has.
        name: The name of a factorization, which may be new.
        components: As the option ``--components`` of ``npeff factorize``.
        any_factorization: Whether the command uses only what all factorizations of a run share.
        kind: As the option ``--kind`` of ``npeff factorize``.
    """
    from npeff.runs.config import RunConfig
    from npeff.runs.directory import RunDirectory
    from npeff.stages.validation import validate_for_workers

    asked = {"name": name, "n_components": components, "max_iterations": max_iterations, "kind": kind}
    changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if run.is_dir():
        if run_dir is not None:
            raise typer.BadParameter("--run-dir needs a run file, not the directory of a run")
        if any_factorization:
            opened = RunDirectory.open_any(run)
        elif name is None:
            opened = RunDirectory.open(run, factorization)
        else:
            opened = _named(run, factorization, name)
        if not changes:
            return opened.with_config(replaced(opened.config, workers, address))
        if components is None and not opened.is_defined():
            raise typer.BadParameter(f"{opened.path} has no factorization yet: give --components")
        return RunDirectory.create(replaced(opened.config.with_factorization(**changes), workers, address))
    config = RunConfig.from_yaml(run)
    if run_dir is not None:
        config = config.model_copy(update={"run_dir": literal(str(run_dir))})
    if factorization is not None:
        changes = {"name": factorization} | changes
    if changes:
        config = config.with_factorization(**changes)
    return RunDirectory.create(replaced(config, workers, address), check=validate_for_workers)


def open_existing(run_dir: str | Path, factorization: str | None) -> RunDirectory:
    """Return a run with this factorization, or with the first one, for commands that concern all of them."""
    from npeff.runs.directory import RunDirectory

    return RunDirectory.open_any(run_dir) if factorization is None else RunDirectory.open(run_dir, factorization)


def _named(run: Path, factorization: str | None, name: str) -> RunDirectory:
    """Return the run with the factorization ``name`` or, if there is none, with the one whose settings it gets."""
    from npeff.runs.directory import RunDirectory

    opened = RunDirectory.open(run, factorization)
    return opened.with_factorization(name) if name in opened.factorizations() else opened


def replaced(config: RunConfig, workers: int | None, address: str | None) -> RunConfig:
    """Return the configuration with ``executor.workers`` and ``executor.address`` replaced where they are given."""
    changes = {"workers": workers, "address": address}
    return config.with_executor(**{name: value for name, value in changes.items() if value is not None})


def progress_of(run: RunDirectory) -> ProgressDisplay:
    """Return a display of a run's progress that also updates the metrics of a Ray cluster."""
    from npeff.execution.ray.metrics import RunMetrics
    from npeff.runs.progress import ObservedProgress, default_progress

    return ObservedProgress(default_progress(), RunMetrics(str(run.path)))
