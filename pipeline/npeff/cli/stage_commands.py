"""Commands that run stages. Torch, Zarr and Ray are imported only when a command that needs them runs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.options import (
    Address,
    Factorization,
    MaxIterations,
    Name,
    Run,
    RunDir,
    Workers,
    open_run,
    progress_of,
)
from npeff.cli.output import OutputFormat, print_table, say
from npeff.stages.factorize import FACTORIZE
from npeff.stages.lift import LIFT
from npeff.stages.registry import STAGES
from npeff.stages.repair import REPAIR
from npeff.stages.scale import SCALE
from npeff.stages.select import SELECT
from npeff.stages.step import STEP
from npeff.stages.transform import TRANSFORM
from npeff.storage.location import location
from npeff.variables import literal

if TYPE_CHECKING:
    from npeff.runs.definition import StageDefinition
    from npeff.runs.directory import RunDirectory


@app.command("run")
def run_command(
    run: Run,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    factorization: Factorization = None,
) -> None:
    """Run the stages from fishers to report. Finished work of earlier commands is not repeated."""
    opened = open_run(run, run_dir, workers, address, factorization=factorization)
    npeff.run(opened, progress=progress_of(opened))
    _print_outcome(opened)


def _complete(stage: StageDefinition, opened: RunDirectory, *arguments: Any) -> None:
    progress = progress_of(opened)
    stage(opened, *arguments, progress=progress)
    progress.say(f"{stage.name}: complete, in {opened.path if stage.of_the_run else opened.home}")


@app.command(FACTORIZE.name, help=FACTORIZE.help)
def factorize_command(
    run: Run,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    max_iterations: MaxIterations = None,
    components: Annotated[int | None, typer.Option(min=1, help="Number of components.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What is factorized: fishers (the default), diagonal_groups, diagonal_entries, gradients, squared, "
            "kmeans, pca, or random.",
        ),
    ] = None,
    name: Name = None,
    factorization: Factorization = None,
) -> None:
    opened = open_run(
        run, run_dir, workers, address, max_iterations, factorization, name, components=components, kind=kind
    )
    _complete(FACTORIZE, opened)


@app.command(LIFT.name, help=LIFT.help)
def lift_command(
    run: Run,
    component: Annotated[
        list[int] | None,
        typer.Option(
            "--component", "-c", min=0, help="Lift only this component. Repeat the option for several components."
        ),
    ] = None,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    factorization: Factorization = None,
) -> None:
    opened = open_run(run, run_dir, workers, address, factorization=factorization)
    if component:
        opened = opened.with_config(opened.config.with_lift(components=tuple(component)))
    _complete(LIFT, opened)


@app.command("report")
def report_command(
    run: Run,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Serve the live view until Ctrl-C, instead of writing the file."),
    ] = False,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port of the live view (--serve); 0, the default, chooses a free port."),
    ] = None,
    edit: Annotated[
        bool, typer.Option("--edit", help="Let the live view (--serve) change names and notes of components.")
    ] = False,
    factorization: Factorization = None,
) -> None:
    """Write the report of the available results as one HTML file, or serve it on this machine (--serve)."""
    if port is not None and not serve:
        raise typer.BadParameter("--port needs --serve")
    if edit and not serve:
        raise typer.BadParameter("--edit needs --serve")
    from npeff.runs.progress import default_progress

    opened = open_run(run, run_dir, workers, address, factorization=factorization)
    progress = default_progress()
    if serve:
        from npeff.live.server import serve_run

        serve_run(opened, port or 0, progress.say, edit=edit)
    else:
        progress.say(f"report: {npeff.report(opened, progress=progress)}")


@app.command(TRANSFORM.name, help=TRANSFORM.help)
def transform_command(
    source: Annotated[
        Path, typer.Argument(parser=location, metavar="RUN_DIR", help="Directory of the run with the components.")
    ],
    run: Annotated[
        Path,
        typer.Option("--run", parser=location, metavar="RUN", help="Run file, or run directory, of the new examples."),
    ],
    factorization: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Take the components of this factorization. Default: the first one.",
            show_default=False,
        ),
    ] = None,
    name: Name = None,
    workers: Workers = None,
    address: Address = None,
) -> None:
    given = npeff.RunDirectory.open(source, factorization)
    _complete(TRANSFORM, open_run(run, None, workers, address, name=name), given)


@app.command(SELECT.name, help=SELECT.help)
def select_command(
    run: Run,
    components: Annotated[
        str | None, typer.Option(help="Numbers of components to try first: 8,16,32 or 8:64:8 (from, to, step).")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds for each number of components.")] = None,
    refine: Annotated[
        bool | None, typer.Option("--refine/--no-refine", help="Also try numbers near the best of these.")
    ] = None,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    factorization: Factorization = None,
) -> None:
    opened = open_run(run, run_dir, workers, address, factorization=factorization)
    asked = {"components": components, "seeds": seeds, "refine": refine}
    changes = {name: value for name, value in asked.items() if value is not None}
    opened = opened.with_config(opened.config.with_selection(**changes))
    npeff.select(opened, progress=progress_of(opened))
    print_table(npeff.ComponentStore.open(opened.path, opened.name).table("selection"), OutputFormat.TABLE)
    say(f"plot: {npeff.report(opened)}#selection")


@app.command(STEP.name, help=STEP.help)
def step_command(
    run: Run,
    towards: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Parquet file with the columns id (or example) and label. Default: the labels of the fitted examples.",
            show_default=False,
        ),
    ] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="exact (the default), low_rank, kfac, or diagonal.")
    ] = None,
    damping: Annotated[float | None, typer.Option(help="Damping λ of the Fisher, above 0.")] = None,
    step_size: Annotated[
        float | None, typer.Option("--step-size", help="Factor of the step, above 0. Default: the best of several.")
    ] = None,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
) -> None:
    opened = open_run(run, run_dir, workers, address, any_factorization=True)
    asked = {"kind": kind, "damping": damping, "step_size": step_size}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if towards is not None:
        changes["towards"] = literal(towards)
    opened = opened.with_config(opened.config.with_step(**changes))
    summary = npeff.step(opened, progress=progress_of(opened))
    print_table(npeff.ComponentStore.open(opened.path).table("step"), OutputFormat.TABLE)
    if summary["step"] is not None:
        say(f"edited model: {opened.stepped / 'model.safetensors'}; its record: {opened.stepped / 'step.json'}")


@app.command(REPAIR.name, help=REPAIR.help)
def repair_command(
    run: Run,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    factorization: Factorization = None,
) -> None:
    opened = open_run(run, run_dir, workers, address, factorization=factorization)
    summary = npeff.repair(opened, progress=progress_of(opened))
    print_table(npeff.ComponentStore.open(opened.path, opened.name).table("repair"), OutputFormat.TABLE)
    if summary["edits"]:
        say(f"edited model: {opened.repaired / 'model.safetensors'}; its edits: {opened.repaired / 'repair.json'}")


def _print_outcome(run: RunDirectory) -> None:
    """Print the outcome of a run and the commands to explore it."""
    from npeff.stages.status import outcome

    command = "npeff" if shutil.which("npeff") else str(Path(sys.executable).with_name("npeff"))
    for line in outcome(run, command):
        say(line)


_WITH_OWN_OPTIONS = (FACTORIZE, LIFT, TRANSFORM, SELECT, STEP, REPAIR, SCALE)


def _stage_command(stage: StageDefinition) -> None:
    if stage.of_the_run:

        @app.command(stage.name, help=stage.help)
        def command(run: Run, run_dir: RunDir = None, workers: Workers = None, address: Address = None) -> None:
            _complete(stage, open_run(run, run_dir, workers, address, any_factorization=True))

    else:

        @app.command(stage.name, help=stage.help)
        def command_of_factorization(
            run: Run,
            run_dir: RunDir = None,
            workers: Workers = None,
            address: Address = None,
            factorization: Factorization = None,
        ) -> None:
            _complete(stage, open_run(run, run_dir, workers, address, factorization=factorization))


for _stage in STAGES:
    if _stage not in _WITH_OWN_OPTIONS:
        _stage_command(_stage)
