"""Commands that estimate, check, import and export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.options import Address, ExistingRun, RunFile, Workers, progress_of, replaced
from npeff.storage.location import location

EXIT_DAMAGED = 1


_LOG_WIDTH = 320
"""Columns of a table that is not read on a terminal: paths are not cut."""


Exported = Literal["fishers", "factorization", "direction"]


@app.command("estimate")
def estimate_command(
    run: RunFile,
    workers: Workers = None,
    address: Address = None,
    parameters: Annotated[bool, typer.Option(help="List every parameter: taken, or why not.")] = False,
) -> None:
    """What the run would take: memory, disk and time of its Fishers, from a short trial that leaves nothing behind."""
    from rich.console import Console
    from rich.table import Table

    from npeff.stages.fishers.estimate import estimate, rows

    config = replaced(npeff.RunConfig.from_yaml(run), workers, address)
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
    for what, value in rows(found, config):
        table.add_row(what, value)
    Console().print(table)


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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    run = npeff.RunDirectory.open(run_dir)
    run = npeff.RunDirectory(run.path, replaced(run.config, workers, address))
    progress = progress_of(run)
    damaged = npeff.check(run, repair=repair, progress=progress)
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
    from npeff.interchange.import_run import import_run
    from npeff.interchange.options import ImportOptions
    from npeff.runs.progress import default_progress

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
    from npeff.interchange.export_run import export_run
    from npeff.runs.progress import default_progress
    from npeff.stages.pipeline import export_direction

    if component is not None:
        export_direction(npeff.RunDirectory.open(run_dir), component, file)
    elif what != "direction":
        export_run(run_dir, file, what=what, n_values=values)
    default_progress().say(f"export: {what} of {run_dir} written to {file}")
