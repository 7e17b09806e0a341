"""Answers of `npeff query` on standard output: for people, or as JSON, CSV or Parquet."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text


class OutputFormat(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


def print_table(table: Any, output: OutputFormat) -> None:
    """``table`` (a pyarrow.Table) to standard output; long cells are cut in the ``table`` format only."""
    import pyarrow

    try:
        _write_table(table, output)
    except pyarrow.ArrowNotImplementedError as error:
        raise typer.BadParameter(
            f"{output} cannot hold this answer ({str(error).splitlines()[0]}): cast the column to text, or use "
            "--format json"
        ) from None


def _write_table(table: Any, output: OutputFormat) -> None:
    match output:
        case OutputFormat.JSON:
            import base64
            import json

            def encode(value: Any) -> Any:
                return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)

            print(json.dumps(table.to_pylist(), default=encode, indent=1))
        case OutputFormat.CSV:
            import pyarrow.csv

            nested = [field.name for field in table.schema if _is_nested(field.type)]
            if nested:
                print(f"npeff: left out, as CSV holds no lists: {', '.join(nested)}", file=sys.stderr)
            pyarrow.csv.write_csv(table.drop_columns(nested), sys.stdout.buffer)
        case OutputFormat.PARQUET:
            import pyarrow.parquet

            if sys.stdout.isatty():
                raise typer.BadParameter("parquet is binary: send it to a file, --format parquet > answer.parquet")
            pyarrow.parquet.write_table(table, sys.stdout.buffer)
        case OutputFormat.TABLE:
            _print_for_people(table)


def _print_for_people(table: Any) -> None:
    """As many columns as the terminal has room for, from the left, without those that are empty."""
    filled = [name for name in table.column_names if table[name].null_count < len(table)] or table.column_names
    cells = {name: [_cell(value) for value in table[name].to_pylist()] for name in filled}
    room = Console().width if sys.stdout.isatty() else sys.maxsize
    shown: list[str] = []
    width = 1
    for name in filled:
        width += 3 + max(map(len, [name, *cells[name]]))
        if shown and width > room:
            break
        shown.append(name)
    left_out = [name for name in filled if name not in shown]
    grid = Table(*shown)
    for row in zip(*(cells[name] for name in shown), strict=True):
        grid.add_row(*(Text(cell) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else max(width, 20))
    console.print(grid)
    if left_out:
        console.print(f"no room for {', '.join(left_out)}: widen the window, or use --format csv", markup=False)


def _is_nested(kind: Any) -> bool:
    import pyarrow.types

    return bool(pyarrow.types.is_nested(kind))


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case float():
            return f"{value:.4g}"
        case bytes():
            return f"{len(value)} bytes"
        case list():
            return " ".join(_cell(item) for item in value[:4]) + (" …" if len(value) > 4 else "")
        case _:
            text = str(value)
            return text if len(text) <= 80 else text[:79] + "…"
