"""Results of `npeff query` on standard output or in a file: as a readable table, JSON, CSV or Parquet."""

from __future__ import annotations

import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import typer

from npeff.errors import first_line


class OutputFormat(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    PARQUET = "parquet"


_BY_ENDING = {".json": OutputFormat.JSON, ".csv": OutputFormat.CSV, ".parquet": OutputFormat.PARQUET}


def print_table(table: Any, output: OutputFormat) -> None:
    """Write ``table`` (a pyarrow.Table) to standard output. Long cells are cut in the ``table`` format only."""
    write_answer(table, output, None)


def write_answer(table: Any, output: OutputFormat | None, file: Path | None) -> None:
    """Write ``table`` (a pyarrow.Table) to a file, or to standard output if ``file`` is None.

    If ``output`` is None, the extension of the file determines the format; the default is ``table``. An existing file
    is replaced only after the whole result is written.
    """
    import pyarrow

    if output is None:
        output = _BY_ENDING.get(file.suffix.lower(), OutputFormat.TABLE) if file else OutputFormat.TABLE
    try:
        if file is None:
            _print(table, output)
        else:
            partial = file.with_name(f".{file.name}.partial")
            try:
                with partial.open("wb") as stream:
                    _write(table, output, stream)
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
    except pyarrow.ArrowNotImplementedError as error:
        raise typer.BadParameter(
            f"the format {output} does not support this result ({first_line(error)}): cast the column to text, or use "
            "--format json"
        ) from None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        if file is None:
            raise
        raise typer.BadParameter(f"cannot write {file}: {error.strerror}") from None


def _print(table: Any, output: OutputFormat) -> None:
    if output is OutputFormat.PARQUET and sys.stdout.isatty():
        raise typer.BadParameter("parquet is a binary format: write it to a file, --output result.parquet")
    if output is OutputFormat.TABLE:
        _print_for_people(table, sys.stdout)
    else:
        sys.stdout.flush()
        _write(table, output, sys.stdout.buffer)
        sys.stdout.flush()


def _write(table: Any, output: OutputFormat, stream: BinaryIO) -> None:
    match output:
        case OutputFormat.JSON:
            import base64
            import json

            def encode(value: Any) -> Any:
                return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)

            stream.write(json.dumps(table.to_pylist(), default=encode, indent=1).encode() + b"\n")
        case OutputFormat.CSV:
            import pyarrow.csv

            nested = [field.name for field in table.schema if _is_nested(field.type)]
            if nested:
                print(
                    f"npeff: CSV has no lists; columns left out: {', '.join(nested)} (use --format json)",
                    file=sys.stderr,
                )
            pyarrow.csv.write_csv(table.drop_columns(nested), stream)
        case OutputFormat.PARQUET:
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, stream)
        case OutputFormat.TABLE:
            text = io.TextIOWrapper(stream, encoding="utf-8", write_through=True)
            _print_for_people(table, text)
            text.detach()


def _print_for_people(table: Any, stream: TextIO) -> None:
    """Print the non-empty columns, from the left, as many as fit the terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    filled = [name for name in table.column_names if table[name].null_count < len(table)] or table.column_names
    cells = {name: [_cell(value) for value in table[name].to_pylist()] for name in filled}
    room = Console().width if stream.isatty() else sys.maxsize
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
    console = Console(file=stream, width=None if stream.isatty() else max(width, 20))
    console.print(grid)
    if left_out:
        console.print(
            f"columns not shown: {', '.join(left_out)} (widen the terminal, or use --format csv)", markup=False
        )


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
