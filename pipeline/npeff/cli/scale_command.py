"""``npeff scale``: perceptual scales from people's answers in a difference scaling experiment."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import typer

from npeff.cli.app import app
from npeff.cli.options import File, Format
from npeff.cli.output import write_answer
from npeff.errors import NpeffError, as_one_line

_COLUMNS = ("i", "j", "k", "response")
_OBSERVER = "observer"
_LONGEST = 15
"""Largest number of characters of a level."""


@app.command("scale")
def scale_command(
    responses: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            dir_okay=False,
            help="CSV file with the columns i, j, k (three levels, from 0) and response (1 if the difference between j "
            "and k looks larger than that between i and j, otherwise 0). A column observer separates several people.",
        ),
    ],
    confidence_level: Annotated[float, typer.Option(min=0.5, max=0.999, help="Probability of the intervals.")] = 0.99,
    draws: Annotated[int, typer.Option(min=100, max=100_000, help="Number of bootstrap draws.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    output: Format = None,
    file: File = None,
) -> None:
    """Estimate the perceptual scale of each observer from answers about triplets, with bootstrap intervals."""
    import pyarrow as pa

    from npeff.perception.difference_scaling import DifferenceScaling

    rows = []
    for observer, answers in _read(responses).items():
        try:
            fitted = DifferenceScaling().fit(answers)
            found = fitted.intervals(confidence_level, n_draws=draws, seed=seed)
        except ValueError as error:
            whose = "" if observer is None else f"observer {observer!r}: "
            raise NpeffError(f"{responses}: {whose}{error}", path=responses) from None
        for number, psi in enumerate(fitted.psi_.tolist()):
            rows.append(
                {
                    _OBSERVER: observer,
                    "level": number,
                    "psi": psi,
                    "low": float(found.low_n[number]),
                    "high": float(found.high_n[number]),
                    "sigma": fitted.sigma_,
                    "sigma_low": found.sigma[0],
                    "sigma_high": found.sigma[1],
                    "n_trials": len(answers),
                    "n_draws": draws - found.n_left_out,
                }
            )
    kinds = {_OBSERVER: pa.string(), "level": pa.int64(), "n_trials": pa.int64(), "n_draws": pa.int64()}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in rows[0]])
    write_answer(pa.Table.from_pylist(rows, schema), output, file)


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
                found.setdefault(row.get(_OBSERVER), []).append(_answer(path, reader.line_num, row))
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
