"""Results of `npeff query` on standard output or in a file, and lines of all commands.

Texts of the data and of files reach a terminal without control characters (`npeff.errors.printable`). JSON escapes
them. CSV and Parquet files contain them unchanged.
"""

from __future__ import annotations

import io
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

import typer

from npeff.cli.layout import print_expanded, print_fitted
from npeff.errors import first_line, printable


class OutputFormat(StrEnum):
    TABLE = "table"
    EXPANDED = "expanded"
    JSON = "json"
    CSV = "csv"
    SPREADSHEET = "spreadsheet"
    PARQUET = "parquet"


_FORMULA = r"^([=+\-@\t\r\n＝＋－＠])"
"""Pattern of a text that a spreadsheet evaluates, also by the full-width forms of the signs."""

_BY_ENDING = {".json": OutputFormat.JSON, ".csv": OutputFormat.CSV, ".parquet": OutputFormat.PARQUET}


def say(line: str) -> None:
    """Print one line on standard output."""
    print(printable(line), flush=True)


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
    except (pyarrow.ArrowNotImplementedError, pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
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
        print_fitted(table, sys.stdout)
    elif output is OutputFormat.EXPANDED:
        print_expanded(table, sys.stdout)
    else:
        sys.stdout.flush()
        if sys.stdout.isatty():
            written = io.BytesIO()
            _write(table, output, written)
            print(printable(written.getvalue().decode(errors="replace"), keep="\n"), end="")
        else:
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
        case OutputFormat.CSV | OutputFormat.SPREADSHEET:
            import pyarrow.csv

            nested = [field.name for field in table.schema if _is_nested(field.type)]
            if nested:
                names = printable(", ".join(nested))
                print(f"npeff: CSV has no lists; columns left out: {names} (use --format json)", file=sys.stderr)
            table = table.drop_columns(nested)
            pyarrow.csv.write_csv(_without_formulas(table) if output is OutputFormat.SPREADSHEET else table, stream)
        case OutputFormat.PARQUET:
            import pyarrow.parquet

            pyarrow.parquet.write_table(table, stream)
        case OutputFormat.TABLE | OutputFormat.EXPANDED:
            text = io.TextIOWrapper(stream, encoding="utf-8", write_through=True)
            (print_fitted if output is OutputFormat.TABLE else print_expanded)(table, text)
            text.detach()


def _without_formulas(table: Any) -> Any:
    """Return a table whose texts a spreadsheet shows as texts: an apostrophe is put before those that it evaluates."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for position, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        column = table.column(position)
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            column = pc.replace_substring_regex(column.cast(kind), _FORMULA, r"'\1")
        name = re.sub(_FORMULA, r"'\1", field.name)
        table = table.set_column(position, name, column)
    return table


def _is_nested(kind: Any) -> bool:
    import pyarrow.types

    return bool(pyarrow.types.is_nested(kind))
