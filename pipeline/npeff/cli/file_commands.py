"""The commands ``estimate``, ``check`` and ``import``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.layout import rows_table
from npeff.cli.options import (
    Address,
    ExistingRun,
    Format,
    Workers,
    open_existing,
    progress_of,
    replaced,
)
from npeff.cli.output import OutputFormat, say
from npeff.storage.location import location

if TYPE_CHECKING:
    from npeff.runs.config import RunConfig

EXIT_DAMAGED = 1


_LOG_WIDTH = 320
"""Width in characters of a table that is not printed on a terminal, so that paths are not cut."""


@app.command("estimate")
def estimate_command(
    run: Annotated[
        Path | None, typer.Argument(parser=location, metavar="RUN", help="A run file (YAML); optional with --plan.")
    ] = None,
    workers: Workers = None,
    address: Address = None,
    parameters: Annotated[
        bool, typer.Option(help="Also list every parameter, with the reason if it is left out.")
    ] = False,
    planned: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Compute devices, memory, hours and bytes on other hardware by formulas, without the model. Without "
            "RUN: for three large language models.",
        ),
    ] = False,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help="With --plan: a number of the model, the run or the hardware, such as parameters=7e10, examples=50000 "
            "or devices=64. Repeat the option for several.",
        ),
    ] = None,
    output: Format = None,
) -> None:
    """Estimate the memory, disk space and time that a run needs, from a short trial. Writes no files.

    Times are those of this machine, with the work that it does now. Those of the stages after fishers are rough, since
    their numbers of steps depend on the data.
    """
    if planned:
        config = None if run is None else npeff.RunConfig.from_yaml(run)
        _show_plan(config, assume or [], output or OutputFormat.TABLE)
        return
    if run is None:
        raise typer.BadParameter("a run file is missing: give RUN, or --plan")
    if assume or output:
        raise typer.BadParameter("--assume and --format need --plan")
    _show_estimate(replaced(npeff.RunConfig.from_yaml(run), workers, address), parameters)


def _show_estimate(config: RunConfig, parameters: bool) -> None:
    from rich.console import Console

    from npeff.stages.fishers.estimate import estimate, rows

    found = estimate(config)
    if parameters:
        facts = found.trial.facts
        taken = [
            (name, " x ".join(map(str, shape)), "yes")
            for name, shape in zip(facts.layout.names, facts.layout.shapes, strict=True)
        ]
        left_out = [(name, "", f"no: {why.reason}") for name, why in facts.left_out.items()]
        Console().print(rows_table(("parameter", "shape", "taken"), taken + left_out))
    Console().print(rows_table(("what", "estimate"), rows(found, config)))


def _show_plan(config: RunConfig | None, assume: list[str], output: OutputFormat) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console

    from npeff.stages.planned import constant_rows, numbers, plan_rows, plans

    given = numbers(assume)
    found, constants = plans(config, given), constant_rows(given)
    if output is OutputFormat.JSON:
        listed = [dict(zip(("name", "value", "kind", "source"), row, strict=True)) for row in constants]
        say(json.dumps({"plans": {name: asdict(each) for name, each in found.items()}, "constants": listed}))
        return
    if output is not OutputFormat.TABLE:
        raise typer.BadParameter(f"a plan has no format {output}: use table or json")
    Console().print(rows_table(("plan", *found), plan_rows(found)))
    Console().print(rows_table(("number", "value", "", "source"), constants))


@app.command("check")
def check_command(
    run_dir: ExistingRun,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Delete and recompute the damaged parts only.")
    ] = False,
    workers: Workers = None,
    address: Address = None,
    factorization: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Verify only this factorization, and the run. Default: all of them."),
    ] = None,
) -> None:
    """Verify every file of a run directory. The exit code is 1 if something is damaged."""
    from rich.console import Console

    opened = open_existing(run_dir, factorization)
    run = opened.with_config(replaced(opened.config, workers, address))
    progress = progress_of(run)
    damaged = npeff.check(run, factorization=factorization, recompute=recompute, progress=progress)
    if not damaged:
        where = f"the run and the factorization {factorization} of" if factorization else "everything in"
        progress.say(f"check: {where} {run.path} {'are' if factorization else 'is'} intact")
        return
    listed = [[str(text) for text in (each.what, each.where, each.why, each.remedy)] for each in damaged]
    table = rows_table(("what", "where", "why", "what to do"), listed)
    Console(width=None if sys.stdout.isatty() else _LOG_WIDTH).print(table)
    raise typer.Exit(EXIT_DAMAGED)


@app.command("import")
def import_command(
    file: Annotated[
        Path,
        typer.Argument(parser=location, metavar="FILE", help="An HDF5 file of the NPEFF reference implementation."),
    ],
    run_dir: Annotated[Path, typer.Argument(parser=location, metavar="RUN_DIR", help="A new directory for the run.")],
    fishers: Annotated[
        Path | None,
        typer.Option(parser=location, metavar="FILE", help="For a decomposition: the PEF file that was decomposed."),
    ] = None,
    components: Annotated[
        int,
        typer.Option(min=1, help="Number of components for a later factorization. A decomposition has its own number."),
    ] = 32,
    max_dim: Annotated[
        int, typer.Option(min=1, help="Hash the parameters if more than this number have values.")
    ] = 65_536,
    dim: Annotated[int, typer.Option(min=1, help="Number of coordinates D after hashing.")] = 4096,
    min_nonzero: Annotated[
        int, typer.Option(min=1, help="Drop parameters with fewer values than this in the file.")
    ] = 1,
    held_out: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            show_default=False,
            help="Fraction of the examples to hold out of the fit; below 1. Default: a third.",
        ),
    ] = 1 / 3,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the hashes, the split and the factorization.")] = 0,
    class_names: Annotated[
        list[str], typer.Option("--class-name", help="Name of a class. Repeat the option for all classes, in order.")
    ] = [],  # noqa: B006
) -> None:
    """Create a run from a file of the NPEFF reference implementation.

    The file contains Fishers (LRM-PEF, LVRM-PEF) or a decomposition (LRM).
    """
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
