"""Commands that run stages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from npeff.cli.app import app
from npeff.cli.options import Address, MaxIterations, Run, RunDir, Workers, open_run, progress_of
from npeff.cli.output import OutputFormat, print_table
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import default_progress
from npeff.stages import pipeline as stages
from npeff.stages.status import outcome
from npeff.storage.location import location


@app.command("run")
def run_command(run: Run, run_dir: RunDir = None, workers: Workers = None, address: Address = None) -> None:
    """Every stage, in order; goes on from whatever is there already."""
    opened = open_run(run, run_dir, workers, address)
    stages.run(opened, progress=progress_of(opened))
    _print_outcome(opened)


def _complete(name: str, opened: RunDirectory, stage: Callable[..., Any], *arguments: Any) -> None:
    progress = progress_of(opened)
    stage(opened, *arguments, progress=progress)
    progress.say(f"{name}: complete, in {opened.path}")


def stage_command(name: str, stage: Callable[..., Any]) -> None:
    def command(run: Run, run_dir: RunDir = None, workers: Workers = None, address: Address = None) -> None:
        _complete(name, open_run(run, run_dir, workers, address), stage)

    command.__doc__ = (stage.__doc__ or "").split("\n\n")[0].replace("\n", " ")
    app.command(name)(command)


@app.command("factorize")
def factorize_command(
    run: Run,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    max_iterations: MaxIterations = None,
) -> None:
    """Fit non-negative coefficients and components to the stored Fishers; goes on from the last checkpoint."""
    _complete("factorize", open_run(run, run_dir, workers, address, max_iterations), stages.factorize)


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
    opened = open_run(run, run_dir, workers, address)
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
    opened = open_run(run, run_dir, workers, address)
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
    _complete("transform", open_run(run, None, workers, address), stages.transform, source)


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
    opened = open_run(run, run_dir, workers, address)
    asked = {"components": components, "seeds": seeds, "refine": refine}
    changes = {name: value for name, value in asked.items() if value is not None}
    opened = RunDirectory(opened.path, opened.config.with_selection(**changes))
    stages.select(opened, progress=progress_of(opened))
    print_table(stages.open_components(opened.path).table("selection"), OutputFormat.TABLE)
    print(f"plot: {stages.report(opened)}#selection")


@app.command("repair")
def repair_command(run: Run, run_dir: RunDir = None, workers: Workers = None, address: Address = None) -> None:
    """Edit the model along components whose top examples it gets wrong; judged on held-out examples."""
    opened = open_run(run, run_dir, workers, address)
    summary = stages.repair(opened, progress=progress_of(opened))
    print_table(stages.open_components(opened.path).table("repair"), OutputFormat.TABLE)
    if summary["edits"]:
        print(
            f"edited model: {opened.repaired / 'model.safetensors'}; what was done: {opened.repaired / 'repair.json'}"
        )


def _print_outcome(run: RunDirectory) -> None:
    """What a newcomer should look at next."""
    console = Console(soft_wrap=True)
    command = "npeff" if shutil.which("npeff") else str(Path(sys.executable).with_name("npeff"))
    for line in outcome(run, command):
        console.print(line, highlight=False, markup=False)
