"""``npeff init``, which writes a first run file, and ``npeff validate``, which checks one without the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.layout import rows_table
from npeff.cli.options import RunFile
from npeff.cli.output import say

if TYPE_CHECKING:
    from npeff.runs.config import RunConfig


@app.command("init")
def init_command(
    data: Annotated[
        str,
        typer.Option(
            metavar="DATA", help="A file or folder of examples, a folder of images by class, or hf:OWNER/NAME."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Folder or hub id of a model. Without it, a small network is trained on a table."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(metavar="TASK", help="Name of the task. Default: that of the class of the model.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="COLUMN", help="Column of texts. Repeat the option for pairs of texts."),
    ] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of labels.")] = None,
    label_names: Annotated[
        str | None, typer.Option(metavar="A,B", help="Names of the classes in the order of the logits.")
    ] = None,
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Split of the data.")] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", dir_okay=False, help="The run file to write.")
    ] = Path("npeff.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented run file for a model and data, whose columns are recognized.

    Example: npeff init --model ./my-classifier --data reviews.csv
    """
    from npeff.stages.new_run_file import new_run_file

    if output.exists() and not force:
        raise typer.BadParameter(f"{output} exists: give another --output, or --force to replace it")
    names = None if label_names is None else [name.strip() for name in label_names.split(",")]
    written = new_run_file(
        f"runs/{output.stem}",
        model=model,
        data=data,
        task=task,
        text=text,
        label=label,
        label_names=names,
        split=split,
    )
    output.write_text(written, encoding="utf-8")
    say(f"init: written to {output}")
    _show(npeff.RunConfig.from_yaml(output), output)
    say(f"next: npeff estimate {output}; npeff run {output}")


@app.command("validate")
def validate_command(run: RunFile) -> None:
    """Check a run file in seconds: keys, options, columns, labels and files. The model is not loaded.

    Commands that load the model do the same checks before they start.
    """
    _show(npeff.RunConfig.from_yaml(run), run)


def _show(config: RunConfig, run: Path) -> None:
    """Check a run file, and show what is found."""
    from rich.console import Console

    from npeff.stages.validation import validate

    facts = validate(config)
    Console().print(rows_table(("what", "found"), [("run file", f"{run} is valid"), *facts.items()]))
