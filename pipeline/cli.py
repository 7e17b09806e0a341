"""The ``npeff`` command. It parses, calls `pipeline.stages`, and prints; every mistake of a user ends in one line."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.exceptions import TyperException

from pipeline import stages
from pipeline.config import RunConfig
from pipeline.errors import NpeffError
from pipeline.estimate import estimate
from pipeline.estimate import rows as estimate_rows
from pipeline.interchange import ImportOptions, export_run, import_run
from pipeline.job_commands import EXIT_INTERRUPTED, status, submit
from pipeline.progress import ObservedProgress, ProgressDisplay, default_progress
from pipeline.query_commands import query_app
from pipeline.query_output import OutputFormat, print_table
from pipeline.run_directory import RunDirectory, location
from pipeline.status import outcome

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_HELP,
)
app.add_typer(query_app, name="query", context_settings=_HELP)

EXIT_DAMAGED = 1
_LOG_WIDTH = 320
"""Columns of a table that is not read on a terminal: paths are not cut."""
EXIT_USER_ERROR = 2
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again, what is finished is kept",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again, what is finished is kept",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
}


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
        help="Write to this directory instead of the run file's run_dir.",
    ),
]
Workers = Annotated[
    int | None, typer.Option("--workers", min=1, help="Actors to use instead of the run file's number.")
]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray to use instead of the run file's: local, auto or host:port.")
]
MaxIterations = Annotated[
    int | None, typer.Option("--max-iterations", min=1, help="Raise the run's limit: a finished factorization goes on.")
]
Exported = Literal["fishers", "factorization", "direction"]


def _open(
    run: Path,
    run_dir: Path | None = None,
    workers: int | None = None,
    address: str | None = None,
    max_iterations: int | None = None,
) -> RunDirectory:
    """The run that a run file or a run directory names, with what the command line replaces in it."""
    if run.is_dir():
        if run_dir is not None:
            raise typer.BadParameter("--run-dir goes with a run file, not with the directory of a run")
        opened = RunDirectory.open(run)
        if max_iterations is not None:
            opened = RunDirectory.create(opened.config.with_max_iterations(max_iterations))
        return RunDirectory(opened.path, _replaced(opened.config, workers, address))
    config = RunConfig.from_yaml(run)
    if run_dir is not None:
        config = config.model_copy(update={"run_dir": str(run_dir)})
    if max_iterations is not None:
        config = config.with_max_iterations(max_iterations)
    return RunDirectory.create(_replaced(config, workers, address))


def _replaced(config: RunConfig, workers: int | None, address: str | None) -> RunConfig:
    changes = {"workers": workers, "address": address}
    return config.with_executor(**{name: value for name, value in changes.items() if value is not None})


def _progress(run: RunDirectory) -> ProgressDisplay:
    """What is shown here of a run's progress; a cluster's metrics tell it too."""
    return ObservedProgress(default_progress(), stages.RunMetrics(str(run.path)))


@app.callback()
def npeff(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Say which version this is.")] = False,
) -> None:
    """Factorize the per-example Fishers of a model (NPEFF), verify the components, look at them.

    Begin with: npeff run jobs/quickstart.yaml
    """
    if version:
        print("npeff", importlib.metadata.version("npeff-pipeline"))
    elif context.invoked_subcommand is None:
        print(context.get_help())


@app.command("run")
def run_command(run: Run, run_dir: RunDir = None, workers: Workers = None, address: Address = None) -> None:
    """Every stage, in order; goes on from whatever is there already."""
    opened = _open(run, run_dir, workers, address)
    stages.run(opened, progress=_progress(opened))
    _print_outcome(opened)


def _complete(name: str, opened: RunDirectory, stage: Callable[..., Any], *arguments: Any) -> None:
    progress = _progress(opened)
    stage(opened, *arguments, progress=progress)
    progress.say(f"{name}: complete, in {opened.path}")


def _stage_command(name: str, stage: Callable[..., Any]) -> None:
    def command(run: Run, run_dir: RunDir = None, workers: Workers = None, address: Address = None) -> None:
        _complete(name, _open(run, run_dir, workers, address), stage)

    command.__doc__ = (stage.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    app.command(name)(command)


for _name, _stage in stages.STAGES.items():
    if _name not in ("factorize", "lift", "report"):
        _stage_command(_name, _stage)


@app.command("factorize")
def factorize_command(
    run: Run,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    max_iterations: MaxIterations = None,
) -> None:
    """Fit non-negative coefficients and components to the stored Fishers; goes on from the last checkpoint."""
    _complete("factorize", _open(run, run_dir, workers, address, max_iterations), stages.factorize)


@app.command("lift")
def lift_command(
    run: Run,
    component: Annotated[
        list[int] | None, typer.Option("--component", "-c", min=0, help="Only this one; may be given again.")
    ] = None,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Lift components from the sketch to directions in parameter space; others may be added later."""
    opened = _open(run, run_dir, workers, address)
    if component:
        opened = RunDirectory(opened.path, opened.config.with_lift(components=tuple(component)))
    _complete("lift", opened, stages.lift)


@app.command("report")
def report_command(
    run: Run,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Write nothing: show the report, and boxes to ask the run, in the browser.")
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="With --serve: where to listen; 0, the default, is any free one."),
    ] = None,
) -> None:
    """Write the report, one HTML file, from whatever is there; or serve it on this machine until Ctrl-C."""
    if port is not None and not serve:
        raise typer.BadParameter("--port goes with --serve")
    opened = _open(run, run_dir, workers, address)
    progress = default_progress()
    if serve:
        stages.serve_report(opened, port or 0, progress.say)
    else:
        stages.report(opened, progress=progress)
        progress.say(f"report: complete, in {opened.path}")


@app.command("transform")
def transform_command(
    source: Annotated[
        Path, typer.Argument(parser=location, metavar="RUN_DIR", help="The run whose components are used.")
    ],
    run: Annotated[
        Path,
        typer.Option("--run", parser=location, metavar="RUN", help="A run file of the new examples, or its directory."),
    ],
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Coefficients of new examples: their Fishers, and a run's components as they are."""
    _complete("transform", _open(run, None, workers, address), stages.transform, source)


@app.command("select")
def select_command(
    run: Run,
    components: Annotated[
        str | None, typer.Option(help="Numbers of components to try: 8,16,32 or 8:64:8 (from, to, step).")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds, and splits into halves, to fit each with.")] = None,
    refine: Annotated[
        bool | None, typer.Option("--refine/--no-refine", help="Try further ones around the best of these.")
    ] = None,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """How many components there should be: fits of a range of them, compared; asked again, it goes on."""
    opened = _open(run, run_dir, workers, address)
    asked = {"components": components, "seeds": seeds, "refine": refine}
    changes = {name: value for name, value in asked.items() if value is not None}
    opened = RunDirectory(opened.path, opened.config.with_selection(**changes))
    stages.select(opened, progress=_progress(opened))
    print_table(stages.open_components(opened.path).table("selection"), OutputFormat.TABLE)
    print(f"plot: {stages.report(opened)}#selection")


@app.command("repair")
def repair_command(run: Run, run_dir: RunDir = None, workers: Workers = None, address: Address = None) -> None:
    """Edit the model along components whose top examples it gets wrong; judged on held-out examples."""
    opened = _open(run, run_dir, workers, address)
    summary = stages.repair(opened, progress=_progress(opened))
    print_table(stages.open_components(opened.path).table("repair"), OutputFormat.TABLE)
    if summary["edits"]:
        print(
            f"edited model: {opened.repaired / 'model.safetensors'}; what was done: {opened.repaired / 'repair.json'}"
        )


@app.command("estimate")
def estimate_command(
    run: RunFile,
    workers: Workers = None,
    address: Address = None,
    parameters: Annotated[bool, typer.Option(help="List every parameter: taken, or why not.")] = False,
) -> None:
    """What the run would take: memory, disk and time of its Fishers, from a short trial that leaves nothing behind."""
    config = _replaced(RunConfig.from_yaml(run), workers, address)
    found = estimate(config)
    if parameters:
        facts = found.trial.facts
        listed = Table("parameter", "shape", "taken")
        for name, shape in zip(facts.layout.names, facts.layout.shapes, strict=True):
            listed.add_row(name, " x ".join(map(str, shape)), "yes")
        for name, reason in facts.left_out.items():
            listed.add_row(name, "", f"no: {reason}")
        Console().print(listed)
    table = Table("what", "estimate")
    for what, value in estimate_rows(found, config):
        table.add_row(what, value)
    Console().print(table)


app.command("status")(status)
app.command("submit")(submit)


@app.command("check")
def check_command(
    run_dir: ExistingRun,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete what is damaged, nothing else, and compute that again.")
    ] = False,
    workers: Workers = None,
    address: Address = None,
) -> None:
    """Read everything in a run's directory and verify it; exit code 1 where something is damaged."""
    run = RunDirectory.open(run_dir)
    run = RunDirectory(run.path, _replaced(run.config, workers, address))
    progress = _progress(run)
    damaged = stages.check(run, repair=repair, progress=progress)
    if not damaged:
        progress.say(f"check: everything in {run.path} is whole")
        return
    table = Table("what", "where", "why", "what to do")
    for each in damaged:
        table.add_row(*(escape(str(text)) for text in (each.what, each.where, each.why, each.remedy)))
    Console(width=None if sys.stdout.isatty() else _LOG_WIDTH).print(table)
    raise typer.Exit(EXIT_DAMAGED)


@app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(parser=location, metavar="FILE", help="An HDF5 file of the NPEFF reference.")],
    run_dir: Annotated[Path, typer.Argument(parser=location, metavar="RUN_DIR", help="A new directory for the run.")],
    fishers: Annotated[
        Path | None,
        typer.Option(
            parser=location, metavar="FILE", help="With a decomposition: the PEF file that it is a decomposition of."
        ),
    ] = None,
    components: Annotated[int, typer.Option(min=1, help="Components to factorize the Fishers into.")] = 32,
    max_dim: Annotated[int, typer.Option(min=1, help="Keep up to so many parameters as they are; hash more.")] = 65_536,
    dim: Annotated[int, typer.Option(min=1, help="Coordinates to hash them into.")] = 4096,
    min_nonzero: Annotated[int, typer.Option(min=1, help="Drop parameters with fewer values.")] = 1,
    held_out: Annotated[float, typer.Option(min=0, max=1, help="Share of the examples not to fit on.")] = 1 / 3,
    seed: Annotated[int, typer.Option(min=0, help="Seeds the hashes, the split and the factorization.")] = 0,
    class_names: Annotated[list[str], typer.Option("--class-name", help="Once for each class, in order.")] = [],  # noqa: B006
) -> None:
    """Make a run from Fishers (LRM-PEF, LVRM-PEF) or a decomposition (LRM) of the NPEFF reference."""
    progress = default_progress()
    options = ImportOptions(
        n_components=components,
        max_dim=max_dim,
        dim=dim,
        min_nonzero=min_nonzero,
        held_out_fraction=held_out,
        seed=seed,
        class_names=tuple(class_names),
    )
    run = import_run(file, run_dir, fishers=fishers, options=options, progress=progress)
    progress.say(f"import: complete, in {run.path}")


@app.command("export")
def export_command(
    run_dir: ExistingRun,
    file: Annotated[
        Path, typer.Argument(parser=location, metavar="FILE", help="The HDF5 or safetensors file to write.")
    ],
    what: Annotated[Exported, typer.Option(help="What of the run.")] = "fishers",
    values: Annotated[int | None, typer.Option(min=1, help="Only so many largest values of each example.")] = None,
    component: Annotated[
        int | None, typer.Option("--component", "-c", min=0, help="Of the direction, a safetensors file.")
    ] = None,
) -> None:
    """Write Fishers or a factorization as an HDF5 file of the NPEFF reference, or a direction as safetensors."""
    if (what == "direction") != (component is not None):
        raise typer.BadParameter("--component goes with --what direction, and is needed there")
    if component is not None:
        stages.export_direction(RunDirectory.open(run_dir), component, file)
    elif what != "direction":
        export_run(run_dir, file, what=what, n_values=values)
    default_progress().say(f"export: {what} of {run_dir} written to {file}")


def _print_outcome(run: RunDirectory) -> None:
    """What a newcomer should look at next."""
    console = Console(soft_wrap=True)
    command = "npeff" if shutil.which("npeff") else str(Path(sys.executable).with_name("npeff"))
    for line in outcome(run, command):
        console.print(line, highlight=False, markup=False)


def job(command: str) -> NoReturn:
    """Entry point of the scripts in ``jobs/``: ``--config RUN`` and the options of ``npeff COMMAND``."""
    arguments = sys.argv[1:]
    if "--config" in arguments[:-1]:
        position = arguments.index("--config")
        arguments[position : position + 2] = [arguments[position + 1]]
    main([command, *arguments])


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line; exit code 0 done, 1 `check` found damage, 2 a mistake that one line explains, 130
    interrupted and resumable."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    # zarr leaves a coroutine behind where it is interrupted as it hands over a write, which is not done then
    warnings.filterwarnings("ignore", "coroutine '_runner' was never awaited", RuntimeWarning)
    sys.path.insert(0, os.getcwd())  # tasks named by import path may lie beside the run file's user
    try:
        code = app(arguments, prog_name="npeff", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # typer has made an exit code of the exception
            raise KeyboardInterrupt
        raise SystemExit(code)
    except NpeffError as error:
        _fail(str(error))
    except TyperException as error:
        _fail(_usage(error))
    except (KeyboardInterrupt, typer.Abort):
        print("npeff: interrupted; the same command goes on from here", file=sys.stderr)
        raise SystemExit(EXIT_INTERRUPTED) from None
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _fail(f"{error.filename or 'writing'}: {_DISK_ERRORS[error.errno]}")


def _usage(error: TyperException) -> str:
    """What is wrong with the command line, and which help to read."""
    message = error.format_message().replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    if context is None:
        return message
    command = context.command_path.replace("{", "").replace("}", "")
    return f"{message.rstrip('.')} (see: {command} --help)"


def _fail(message: str) -> NoReturn:
    print("npeff: error: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(EXIT_USER_ERROR)


if __name__ == "__main__":
    main()
