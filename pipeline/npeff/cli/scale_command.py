"""``npeff scale``: the perceptual scale of a model, and those of people from their answers in an experiment."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated, Literal

import typer

import npeff
from npeff.cli.app import app
from npeff.cli.observers import OBSERVER, Intervals, as_table, check_levels, scales_of_people, with_model
from npeff.cli.options import Address, Factorization, File, Format, RunDir, Workers, open_run, progress_of
from npeff.cli.output import write_answer
from npeff.errors import NpeffError, as_one_line
from npeff.stages.scale import SCALE
from npeff.storage.location import location

_COLUMNS = ("i", "j", "k", "response")
_LONGEST = 15
"""Largest number of characters of a level."""


ScaledRun = Annotated[
    Path | None,
    typer.Argument(
        parser=location,
        metavar="RUN",
        help="A run file (YAML), or the directory of an existing run, whose model's scale is computed.",
        show_default=False,
    ),
]
Responses = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        dir_okay=False,
        help="CSV file with the columns i, j, k (three levels, from 0) and response (1 if the difference between j and "
        "k looks larger than that between i and j, otherwise 0). A column observer separates several people. With RUN, "
        "people and the model are in one table.",
    ),
]


@app.command(SCALE.name, help=SCALE.help)
def scale_command(
    run: ScaledRun = None,
    responses: Responses = None,
    pairs: Annotated[
        int | None, typer.Option(min=1, help="Number of random pairs of examples, or of examples with --along.")
    ] = None,
    along: Annotated[
        str | None, typer.Option(metavar="PARAMETER", help="Change this stimulus parameter of the task.")
    ] = None,
    space: Annotated[
        Literal["model", "input", "gaussian"] | None,
        typer.Option(help="A prediction to compare with the model: of the inputs, or of Gaussian textures."),
    ] = None,
    component: Annotated[
        list[int] | None,
        typer.Option(
            "--component", "-c", min=0, help="Compute this component's share of paths. Repeat for several components."
        ),
    ] = None,
    confidence_level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Probability of the intervals.")] = 0.99,
    draws: Annotated[int, typer.Option(min=100, max=100_000, help="Number of bootstrap draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    output: Format = None,
    file: File = None,
    run_dir: RunDir = None,
    workers: Workers = None,
    address: Address = None,
    factorization: Factorization = None,
) -> None:
    if run is None and responses is None:
        raise typer.BadParameter("give RUN, --responses FILE, or both")
    asked = {"pairs": pairs, "along": along, "space": space, "components": tuple(component) if component else None}
    changes = {name: value for name, value in asked.items() if value is not None}
    if run is None and (changes or run_dir is not None or factorization is not None):
        raise typer.BadParameter("--pairs, --along, --space, --component, --run-dir and --factorization need RUN")
    intervals = Intervals(confidence_level, draws, seed)
    people = [] if responses is None else scales_of_people(_read(responses), responses, intervals)
    if run is None:
        write_answer(as_table(people), output, file)
        return
    opened = open_run(run, run_dir, workers, address, factorization=factorization)
    if changes:
        opened = opened.with_config(opened.config.with_scale(**changes))
    if people:
        check_levels(people, opened)
    progress = progress_of(opened)
    SCALE(opened, progress=progress)
    progress.say(f"scale: complete, in {opened.home}")
    if people:
        write_answer(as_table(with_model(people, opened, intervals)), output, file)
    elif output is not None or file is not None:
        write_answer(npeff.ComponentStore.open(opened.path, opened.name).table("paths"), output, file)


def _read(path: Path) -> dict[str | None, list[tuple[int, ...]]]:
    """Return the answers (i, j, k, response) of each observer; of None without a column of observers."""
    found: dict[str | None, list[tuple[int, ...]]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                problem = f"{path} has no column {missing[0]!r}"
                raise NpeffError(problem, "its first line must name the columns i, j, k and response", path=path)
            for row in reader:
                found.setdefault(row.get(OBSERVER), []).append(_answer(path, reader.line_num, row))
    except (OSError, UnicodeError, csv.Error) as error:
        raise NpeffError(f"cannot read {path}: {as_one_line(error)}", "give a CSV file", path=path) from None
    if not found:
        raise NpeffError(f"{path} has no answers", "give one line for each answer", path=path)
    return found


def _answer(path: Path, line: int, row: dict[str, str | None]) -> tuple[int, ...]:
    """Return the answer of a line. ``DictReader`` puts cells without a column under the key None."""
    cells = [row[name] or "" for name in _COLUMNS]
    if None not in row and all(cell.strip().isdecimal() and len(cell) <= _LONGEST for cell in cells):
        i, j, k, response = (int(cell) for cell in cells)
        if i < j < k and response in (0, 1):
            return i, j, k, response
    shown = as_one_line(ValueError(", ".join(cells)))
    problem = f"{path}: line {line} is ({shown})"
    raise NpeffError(problem, "it must be levels i < j < k, and the response 0 or 1, without further cells", path=path)
