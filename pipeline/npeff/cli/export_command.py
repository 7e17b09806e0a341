"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.options import ExistingRun, Factorization
from npeff.storage.location import location

Exported = Literal["fishers", "factorization", "direction", "examples"]


@app.command("export")
def export_command(
    run_dir: ExistingRun,
    file: Annotated[Path, typer.Argument(parser=location, metavar="FILE", help="The file to write.")],
    what: Annotated[Exported, typer.Option(help="What to export.")] = "fishers",
    values: Annotated[
        int | None, typer.Option(min=1, help="With --what fishers: number of largest values to keep for each example.")
    ] = None,
    component: Annotated[
        int | None, typer.Option("--component", "-c", min=0, help="With --what direction: the component.")
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            "-n",
            min=1,
            show_default=False,
            help="With --what examples: number of top examples of each split, and of contrast examples. Default: 20.",
        ),
    ] = None,
    factorization: Factorization = None,
) -> None:
    """Write Fishers, a factorization, a direction or the examples of components to a file.

    Fishers and factorizations are written as HDF5 files of the NPEFF reference implementation, directions as
    safetensors files, and examples as JSON lines, one for each component.
    """
    _refuse_unused("--component", component, what, "direction")
    _refuse_unused("--values", values, what, "fishers")
    _refuse_unused("-n", examples, what, "examples")
    from npeff.runs.progress import default_progress

    if what == "direction":
        from npeff.stages.pipeline import export_direction

        if component is None:
            raise typer.BadParameter("--what direction needs --component")
        export_direction(npeff.RunDirectory.open(run_dir, factorization), component, file)
    elif what == "examples":
        from npeff.interchange.export_examples import export_examples

        export_examples(run_dir, file, n_examples=examples or 20, factorization=factorization)
    else:
        from npeff.interchange.export_run import export_run

        export_run(run_dir, file, what=what, n_values=values, factorization=factorization)
    default_progress().say(f"export: {what} of {run_dir} written to {file}")


def _refuse_unused(option: str, value: object, what: str, needed: str) -> None:
    if value is not None and what != needed:
        raise typer.BadParameter(f"{option} needs --what {needed}")
