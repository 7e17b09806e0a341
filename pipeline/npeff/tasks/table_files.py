"""Reading of one file of a table. Text formats are read without guessing types, except for numbers and booleans.

CSV and JSON lines are read with Python's own modules: pyarrow limits the length of a row, reads past quotes that do not
match, converts texts such as ``2020-01-01``, and crashes on deeply nested JSON.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pyarrow.parquet

from npeff.errors import as_one_line
from npeff.tasks.errors import TaskError

FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".arrow", ".feather")
"""Extensions of the files to read in a folder. A single file may also be a tab-separated .txt file."""
UNTYPED = (".csv", ".tsv", ".txt")
"""Extensions of formats in which every cell is a text."""
IN_PARTS = (".parquet", ".arrow", ".feather")
"""Extensions of formats that are read in parts, so that a file may be larger than the memory."""

_BYTE_ORDER_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}  # fmt: skip
_ROWS_AT_ONCE = 1 << 15
_NULLS = ("", "NA", "N/A", "n/a", "#N/A", "NaN", "nan", "NULL", "null")
"""Cells without a value in a column of numbers or booleans."""
_FORMS = (
    (pa.int64(), r"^-?(0|[1-9]\d*)$"),  # without leading zeros, which are part of a code
    (pa.float64(), r"^-?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^-?inf$"),
    (pa.bool_(), r"^(true|false|True|False|TRUE|FALSE)$"),
)

_NO_COLUMN = (pa.ArrowException, OverflowError, TypeError, ValueError)
"""Exceptions of values of several types, of integers of more than 64 bits, and of texts with half a character."""
_USUAL: tuple[tuple[Callable[[pa.DataType], bool], Callable[[Any], pa.DataType]], ...] = (
    (pa.types.is_string_view, lambda _: pa.large_string()),
    (pa.types.is_binary_view, lambda _: pa.large_binary()),
    (pa.types.is_float16, lambda _: pa.float32()),
    (pa.types.is_fixed_size_list, lambda kind: pa.list_(kind.value_type)),
)
"""Types that are replaced, with the type that replaces each."""


def read_file(path: Path, written: Collection[str], used: Collection[str], most_rows: int | None = None) -> pa.Table:
    """Read a file.

    Args:
        path: The file.
        written: Columns of JSON lines whose values are read as texts, as they are written.
        used: Columns that are used. Lists and objects of other columns in JSON lines are not read.
        most_rows: Read only about this number of rows from the beginning of the file, and nothing after them.

    Returns:
        The columns. All columns of a format in `UNTYPED` are texts; see `typed`.

    Raises:
        TaskError: The file cannot be read, or is not well-formed.
    """
    with _readable(path):
        match path.suffix:
            case ".parquet":
                with pyarrow.parquet.ParquetFile(path) as file:
                    return plain(file.read() if most_rows is None else _first_rows(file, most_rows))
            case ".csv":
                return _read_separated(path, most_rows, delimiter=",", strict=True)
            case ".tsv" | ".txt":
                return _read_separated(path, most_rows, delimiter="\t", quoting=csv.QUOTE_NONE)
            case ".jsonl":
                return _read_json_lines(path, written, used, most_rows)
            case ".arrow" | ".feather":
                return plain(_read_arrow(path, most_rows))
    raise TaskError(f"cannot read {path}: use a file ending in {', '.join(FORMATS)}")


def read_parts(path: Path) -> Iterator[pa.Table]:
    """Yield the rows of a file of a format in `IN_PARTS`, with the same types in all parts. The first part is empty.

    Raises:
        TaskError: The file cannot be read, or is not well-formed.
    """
    with _readable(path):
        for part in _parts_of_parquet(path) if path.suffix == ".parquet" else _parts_of_arrow(path):
            yield plain(part)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Convert the errors of reading a file."""
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait
            raise _error(path, None, "it is not a file", "give a file, or a folder of files")
        yield
    except (OSError, pa.ArrowException, UnicodeError) as error:
        problem = f"cannot read {path}: {as_one_line(error)}"
        raise TaskError(problem, "correct the path, or write the file again", path=path) from None


def _parts_of_parquet(path: Path) -> Iterator[pa.Table]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield file.schema_arrow.empty_table()
        for batch in file.iter_batches(_ROWS_AT_ONCE):
            yield pa.Table.from_batches([batch])


def _parts_of_arrow(path: Path) -> Iterator[pa.Table]:
    """Yield the record batches of a feather file, or of a stream, which the library datasets writes."""
    if _starts_with(path, b"FEA1"):  # the first version of the format
        table = pyarrow.feather.read_table(path)
        yield from (table.slice(0, 0), table)
        return
    with pa.memory_map(str(path)) as file:
        if _starts_with(path, b"\xff\xff\xff\xff"):
            reader = pa.ipc.open_stream(file)
            batches: Iterable[pa.RecordBatch] = reader
        else:
            reader = pa.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        yield reader.schema.empty_table()
        for batch in batches:
            yield pa.Table.from_batches([batch])


def typed(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts as integers, numbers or booleans if all of its cells are, and unchanged otherwise.

    A cell such as NA is then null. Dates, and codes with leading zeros such as 0001, are texts.
    """
    return _converted(cells, _FORMS)


def typed_labels(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts as integers if all of its cells are. Otherwise, only empty cells become null."""
    labels = _converted(cells, _FORMS[:1])
    return labels if pa.types.is_integer(labels.type) else _without(cells, ("",))


def _converted(cells: pa.ChunkedArray, forms: Sequence[tuple[pa.DataType, str]]) -> pa.ChunkedArray:
    values = _without(cells, _NULLS)
    if values.null_count == len(values):
        return cells
    for kind, form in forms:
        if pc.all(pc.match_substring_regex(values, form)).as_py():
            try:
                return values.cast(kind)
            except pa.ArrowInvalid:  # an integer that needs more than 64 bits
                return cells
    return cells


def _without(cells: pa.ChunkedArray, nulls: Sequence[str]) -> pa.ChunkedArray:
    return pc.if_else(pc.is_in(cells, pa.array(nulls)), pa.scalar(None, pa.string()), cells)


def _error(path: Path, line: int | None, problem: str, remedy: str) -> TaskError:
    where = "" if line is None else f"line {line} "
    return TaskError(f"cannot read {path}: {where}{problem}", remedy, path=path)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file with their ends. The byte order mark determines the encoding, UTF-8 without."""
    with path.open("rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")
    utf_8 = encoding.startswith("utf-8")
    number = 0
    with path.open(encoding=encoding, errors="surrogateescape" if utf_8 else "strict", newline="") as file:
        try:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    remedy = "save the file as UTF-8" if number == 1 else "write the file again"
                    raise _error(path, number, "contains a NUL character", remedy)
                if not line.isascii():
                    line.encode()  # a byte that is not UTF-8 was read as a surrogate
                yield line
        except UnicodeError:
            name = "UTF-8" if utf_8 else encoding.upper()
            raise _error(path, number if utf_8 else None, f"is not {name}", "save the file as UTF-8") from None


def _first_rows(file: pyarrow.parquet.ParquetFile, most_rows: int) -> pa.Table:
    first = next(file.iter_batches(batch_size=most_rows), None)
    return pa.Table.from_batches([] if first is None else [first], file.schema_arrow)


def _read_separated(path: Path, most_rows: int | None, **dialect: Any) -> pa.Table:
    """Read a CSV file as RFC 4180 defines it, or a tab-separated file without quotes. Empty lines are skipped."""
    rows = _rows(path, **dialect)
    header = next(rows, None)
    if header is None:
        raise _error(path, None, "it is empty", "give a file with a line of column names")
    schema = pa.schema([(name, pa.string()) for name in header])
    rows = islice(rows, most_rows)
    batches = []
    while some := list(islice(rows, _ROWS_AT_ONCE)):
        columns = [pa.array(column, pa.string()) for column in zip(*some, strict=True)]
        batches.append(pa.record_batch(columns, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _rows(path: Path, **dialect: Any) -> Iterator[list[str]]:
    """Yield the rows with the number of columns of the first."""
    most = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(_lines(path), **dialect)
        columns = None
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error:
                problem = "begins a row with a quote that is not closed, or closed before the end of the cell"
                raise _error(path, line, problem, "double each quote within a quoted text") from None
            if row is None:
                return
            columns = columns or len(row)
            if row and len(row) != columns:
                problem = f"begins a row of {len(row)} cells, but the header has {columns}"
                remedy = "put texts with commas or line breaks in quotes" if "strict" in dialect else "correct its tabs"
                raise _error(path, line, problem, remedy)
            if row:
                yield row
    finally:
        csv.field_size_limit(most)


class _Number(float):
    """A number of a JSON text that is not an integer, with its text."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def _read_json_lines(path: Path, written: Collection[str], used: Collection[str], most_rows: int | None) -> pa.Table:
    lines, rows = [], []
    for line, row in islice(_objects(path), most_rows):
        lines.append(line)
        rows.append(row)
    if not rows:
        raise _error(path, None, "it is empty", "write one JSON object per line")
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if name in written and not all(value is None or _is_int64(value) for value in values):
            values = [_as_written(value) for value in values]
        elif name not in used and any(isinstance(value, list | dict) for value in values):
            values = [[] if value is None else [None] for value in values]  # not read, because it can have any form
        try:
            columns[name] = pa.array(values)
        except _NO_COLUMN as error:
            line = lines[bisect_left(range(len(rows)), True, key=lambda row: not _is_column(values[: row + 1]))]
            problem = f"has a {name!r} that does not fit the lines before ({as_one_line(error, 100)})"
            raise _error(path, line, problem, "write values of one kind in this column, or remove it") from None
    return pa.table(columns)


def _is_int64(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_column(values: Sequence[Any]) -> bool:
    try:
        pa.array(values)
    except _NO_COLUMN:
        return False
    return True


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line of JSON lines. Empty lines are skipped."""
    decoder = json.JSONDecoder(parse_float=_Number, object_pairs_hook=_object)
    remedy = "write one JSON object per line"
    for line, text in enumerate(_lines(path), 1):
        if not text.strip():
            continue
        try:
            row = decoder.decode(text)
        except RecursionError:
            raise _error(path, line, "is nested too deeply", "remove the nested values") from None
        except json.JSONDecodeError as error:
            raise _error(path, line, f"is not JSON (column {error.colno}: {error.msg})", remedy) from None
        except ValueError as error:  # of _object, or an integer with thousands of digits
            raise _error(path, line, f"cannot be read ({as_one_line(error, 100)})", "correct the line") from None
        if not isinstance(row, dict):
            raise _error(path, line, "is not a JSON object", remedy)
        yield line, row


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a name twice")
    return found


def _as_written(value: Any) -> Any:
    """Return the text of a value, and a list with the texts of its items; null and objects are unchanged."""
    match value:
        case list():
            return [item if isinstance(item, list) else _as_written(item) for item in value]
        case bool():
            return str(value).lower()
        case _Number():
            return value.text
        case int() | float():
            return str(value)
        case _:
            return value


def _read_arrow(path: Path, most_rows: int | None) -> pa.Table:
    """Read a feather file, or a stream of record batches, which the library datasets writes."""
    is_stream = _starts_with(path, b"\xff\xff\xff\xff")
    if most_rows is None and not is_stream:
        return pyarrow.feather.read_table(path)
    with pa.OSFile(str(path)) as file:
        if not is_stream:
            with pa.ipc.open_file(file) as reader:
                batches = [reader.get_batch(0)] if reader.num_record_batches else []
                return pa.Table.from_batches(batches, reader.schema).slice(0, most_rows)
        with pa.ipc.open_stream(file) as reader:
            if most_rows is None:
                return reader.read_all()
            return pa.Table.from_batches(islice(reader, 1), reader.schema).slice(0, most_rows)


def _starts_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def plain(table: pa.Table) -> pa.Table:
    """Return a table with values in place of categories and runs, and with the usual types of texts, bytes and lists.

    The functions of pyarrow that select rows do not take the other types.
    """
    table.validate(full=True)  # texts that are not UTF-8, and offsets outside the data
    columns = [_plain_column(column) for column in table.columns]
    return pa.table(columns, names=table.column_names)


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if isinstance(kind, pa.UuidType):
        return pa.chunked_array([[None if value is None else str(value) for value in column.to_pylist()]], pa.string())
    if isinstance(kind, pa.BaseExtensionType):
        return _plain_column(column.cast(kind.storage_type))
    if pa.types.is_run_end_encoded(kind):
        return _plain_column(pc.run_end_decode(column))
    if pa.types.is_dictionary(kind):
        decoded = [_plain_column(part.dictionary).take(part.indices) for part in column.chunks]
        return pa.chunked_array(decoded, None if decoded else kind.value_type)
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):  # pyarrow casts some of them to broken lists
        usual_kind = pa.list_(kind.value_type)
        return pa.chunked_array([pa.array(part.to_pylist(), usual_kind) for part in column.chunks], usual_kind)
    for has_type, usual in _USUAL:
        if has_type(kind):
            return column.cast(usual(kind))
    return column
