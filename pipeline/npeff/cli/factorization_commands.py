"""The commands ``compare``, ``rm`` and ``migrate``, which concern the factorizations of a run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.options import ExistingRun, File, Format
from npeff.cli.output import say, write_answer
from npeff.errors import printable
from npeff.storage.location import location


@app.command("compare")
def compare_command(
    run_dir: ExistingRun,
    other: Annotated[
        Path | None,
        typer.Argument(parser=location, metavar="OTHER_RUN_DIR", help="Directory of another run of the model."),
    ] = None,
    factorization: Annotated[
        list[str],
        typer.Option(
            metavar="NAME",
            help="A factorization. Give two: of one run, or one of each run. Without a factorization and another run, "
            "all factorizations of the run are compared by their verification.",
        ),
    ] = [],  # noqa: B006
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="Also write a page (HTML) with the table of all factorizations and a figure.",
        ),
    ] = None,
    output: Format = None,
    file: File = None,
) -> None:
    """Compare all factorizations of a run, or match the components of two factorizations or runs."""
    if other is None and not factorization:
        write_answer(npeff.compare_factorizations(run_dir), output, file)
        if page is not None:
            # standard output holds the table, in a format that another program may read
            print(printable(f"page: {npeff.write_comparison(run_dir, page)}"), file=sys.stderr)
        return
    if page is not None:
        raise typer.BadParameter("--page shows all factorizations of one run: give one run, without --factorization")
    if len(factorization) > 2 or (other is None and len(factorization) != 2):
        raise typer.BadParameter("give one run, two runs, or one run and --factorization twice")
    names: list[str | None] = [*factorization, None, None][:2] if len(factorization) != 1 else [*factorization] * 2
    first = npeff.ComponentStore.open(run_dir, names[0])
    second = npeff.ComponentStore.open(run_dir if other is None else other, names[1])
    write_answer(npeff.compare(first, second), output, file)


@app.command("rm")
def rm_command(
    run_dir: ExistingRun,
    factorization: Annotated[str, typer.Option("--factorization", metavar="NAME", help="The factorization to delete.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a factorization of a run with its directions, tables and report. The Fishers stay."""
    if not yes:
        question = f"delete the factorization {factorization} of {run_dir}?"
        if not sys.stdin.isatty():
            raise typer.BadParameter(f"{question} give --yes to confirm")
        typer.confirm(printable(question), abort=True)
    npeff.remove_factorization(run_dir, factorization)
    say(f"rm: factorization {factorization} of {run_dir} is deleted")


@app.command("migrate")
def migrate_command(run_dir: ExistingRun) -> None:
    """Move the files of a run of an earlier version to where this version writes them. Resumes a migration."""
    run = npeff.migrate(run_dir)
    say(f"migrate: complete, in {run.path}")
