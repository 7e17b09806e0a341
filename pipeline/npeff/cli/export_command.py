"""The command ``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.options import ExistingRun, Factorization
from npeff.cli.output import say
from npeff.storage.location import location

Exported = Literal["fishers", "factorization", "direction", "examples", "lora"]


Values = Annotated[
    int | None, typer.Option(min=1, help="With --what fishers: number of largest values to keep for each example.")
]
Component = Annotated[
    int | None, typer.Option("--component", "-c", min=0, help="With --what direction or lora: the component.")
]
Epsilon = Annotated[
    float | None,
    typer.Option(help="With --what lora and --component: length of the step along the unit direction, with sign."),
]
Edited = Annotated[
    Literal["repair", "step"] | None,
    typer.Option(help="With --what lora: the edited model of this stage, in place of a component."),
]
Error = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        show_default=False,
        help="With --what lora: largest error of the update of a layer, relative to its norm. The rank is the smallest "
        "with this error, but at most 256. Default: 0.01.",
    ),
]
Rank = Annotated[int | None, typer.Option(min=1, help="With --what lora: the rank, in place of --error.")]
Examples = Annotated[
    int | None,
    typer.Option(
        "-n",
        min=1,
        show_default=False,
        help="With --what examples: number of top examples of each split, and of contrast examples. Default: 20.",
    ),
]


@app.command("export")
def export_command(
    run_dir: ExistingRun,
    file: Annotated[
        Path, typer.Argument(parser=location, metavar="FILE", help="The file to write; for --what lora, a new folder.")
    ],
    what: Annotated[Exported, typer.Option(help="What to export.")] = "fishers",
    values: Values = None,
    component: Component = None,
    epsilon: Epsilon = None,
    edited: Edited = None,
    error: Error = None,
    rank: Rank = None,
    examples: Examples = None,
    factorization: Factorization = None,
) -> None:
    """Write Fishers, a factorization, a direction, the examples of components, or an adapter.

    Fishers and factorizations are written as HDF5 files of the NPEFF reference implementation, directions as
    safetensors files, and examples as JSON lines, one for each component. lora writes a step along a direction, or an
    edited model, as a LoRA adapter in the format of PEFT.
    """
    _refuse_unused("--component", component, what, "direction", "lora")
    _refuse_unused("--values", values, what, "fishers")
    _refuse_unused("-n", examples, what, "examples")
    for option, value in (("--epsilon", epsilon), ("--edited", edited), ("--error", error), ("--rank", rank)):
        _refuse_unused(option, value, what, "lora")
    if what == "lora":
        _export_lora(run_dir, file, factorization, component, epsilon, edited, error, rank)
    elif what == "direction":
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
    from npeff.runs.progress import default_progress

    default_progress().say(f"export: {what} of {run_dir} written to {file}")


def _export_lora(
    run_dir: Path,
    folder: Path,
    factorization: str | None,
    component: int | None,
    epsilon: float | None,
    edited: Literal["repair", "step"] | None,
    error: float | None,
    rank: int | None,
) -> None:
    if (component is None) == (edited is None) or (component is None) != (epsilon is None):
        raise typer.BadParameter(
            "--what lora needs --component with --epsilon, or --edited; `npeff query RUN_DIR verification` has the "
            "epsilon and the sign of the steps of a component"
        )
    if error is not None and rank is not None:
        raise typer.BadParameter("give --error or --rank, not both")
    from npeff.interchange.export_lora import export_lora

    run = npeff.RunDirectory.open(run_dir, factorization)
    wanted: dict[str, Any] = {"component": component, "epsilon": epsilon, "edited": edited, "rank": rank}
    say(f"export: {export_lora(run, folder, **wanted, error=0.01 if error is None else error)}")


def _refuse_unused(option: str, value: object, what: str, *needed: str) -> None:
    if value is not None and what not in needed:
        raise typer.BadParameter(f"{option} needs --what {' or '.join(needed)}")
