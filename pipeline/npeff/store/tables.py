"""The Parquet tables ``<run>/tables/<name>.parquet`` (`npeff.store.schemas`): checked reading and writing.

Rows are stored in small row groups with statistics, so that a query for a few rows reads little data.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from npeff.errors import first_line
from npeff.storage.atomic import write_file_atomically
from npeff.storage.errors import StoreError, damaged_file, os_errors_explained
from npeff.storage.location import is_remote, location
from npeff.store.schemas import SCHEMAS, TABLES_VERSION, columns_since

_MAY_HAVE_MORE_COLUMNS = ("examples",)
_VERSION_KEY, _NAME_KEY, _LINEAGE_KEY = b"npeff.schema_version", b"npeff.table", b"npeff.lineage"

_GROUP_BYTES = {"examples": 2**18}
"""Approximate size of a row group in bytes; 1 MiB in other tables. Queries read single examples all over the table."""
_GROUP_ROWS = (256, 32_768)
_GROUPS_AT_ONCE = 64
"""Number of row groups that are in memory at once when a table is read in parts."""
_WITHOUT_STATISTICS = ("logits", "image", "text")
"""Columns without statistics. No query searches by their order, and the extreme values would enlarge the footer."""
_ENCODINGS: dict[str, dict[str, Any]] = {
    # less than half the size of the default encodings, and several times faster to read
    "coefficients": {
        "compression": "zstd",
        "use_dictionary": ["component"],
        "column_encoding": {"example": "DELTA_BINARY_PACKED", "coefficient": "BYTE_STREAM_SPLIT"},
    }
}


def write_table(path: str | Path, name: str, columns: Mapping[str, Any] | pa.Table, lineage: str | None = None) -> None:
    """Create or replace the Parquet file `path` with table `name`.

    Args:
        path: The file.
        name: Name of the table in `SCHEMAS`.
        columns: A sequence, numpy array or pyarrow array for each column of the schema; an (n, m) array for a list
            column. None is null.
        lineage: What the table was made from; see `npeff.runs.lineage`.

    Raises:
        StoreError: A column is missing or unknown, has another type or length, or is null but not nullable; or the file
            cannot be written. The previous content of `path` is unchanged.
    """
    write_table_in_parts(path, name, [columns], lineage)


def write_table_in_parts(
    path: str | Path, name: str, parts: Iterable[Mapping[str, Any] | pa.Table], lineage: str | None = None
) -> None:
    """Create or replace a Parquet file with a table that is given in parts, each as in `write_table`.

    All parts must have the same columns.
    """
    tables = (_checked(name, _columns(part)) for part in parts)
    first = next(tables, SCHEMAS[name].empty_table())
    metadata = {_NAME_KEY: name.encode(), _VERSION_KEY: str(TABLES_VERSION).encode()}
    if lineage is not None:
        metadata[_LINEAGE_KEY] = lineage.encode()
    options = {
        "write_statistics": [column for column in first.column_names if column not in _WITHOUT_STATISTICS],
        "write_page_checksum": True,
        **_ENCODINGS.get(name, {}),
    }

    def write(stream: BinaryIO) -> None:
        with pq.ParquetWriter(stream, first.schema.with_metadata(metadata), **options) as writer:
            for group in _in_groups(itertools.chain([first], tables), _GROUP_BYTES.get(name, 2**20)):
                writer.write_table(group)

    write_file_atomically(location(path), write)


def _columns(part: Mapping[str, Any] | pa.Table) -> Mapping[str, Any]:
    return {column: part[column] for column in part.column_names} if isinstance(part, pa.Table) else part


def _in_groups(tables: Iterable[pa.Table], group_bytes: int) -> Iterator[pa.Table]:
    """Split and concatenate tables into tables of about ``group_bytes`` bytes, in the same order."""
    waiting: list[pa.Table] = []
    n_waiting, size = 0, _GROUP_ROWS[0]
    for table in tables:
        if not len(table):
            continue
        size = int(np.clip(group_bytes * len(table) // max(table.nbytes, 1), *_GROUP_ROWS))
        waiting.append(table)
        n_waiting += len(table)
        if n_waiting >= size:
            whole = pa.concat_tables(waiting)
            full = n_waiting - n_waiting % size
            yield from (whole.slice(start, size) for start in range(0, full, size))
            waiting, n_waiting = [whole.slice(full)], n_waiting - full
    if n_waiting:
        yield pa.concat_tables(waiting)


def check_version(path: str | Path, schema: pa.Schema) -> None:
    """Raise StoreError if a later version of the program wrote the file with this schema."""
    version = _version(schema)
    if not version.isdigit() or int(version) > TABLES_VERSION:
        raise StoreError(
            f"{path} has schema version {version.decode(errors='replace')}, but this program reads versions up to "
            f"{TABLES_VERSION}",
            "install the version of npeff-pipeline that wrote it, or a later one",
            path=location(path),
        )


def _version(schema: pa.Schema) -> bytes:
    found: bytes = (schema.metadata or {}).get(_VERSION_KEY, b"1")
    return found


def lineage_in(schema: pa.Schema) -> str | None:
    """Return what a table was made from, according to the metadata of its file; None if it is unknown."""
    found = (schema.metadata or {}).get(_LINEAGE_KEY)
    return None if found is None else found.decode(errors="replace")


def table_lineage(path: Path) -> str | None:
    """Return the lineage in the metadata of the Parquet file `path`; None if it is unknown.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        with os_errors_explained("read", path), path.open("rb") as stream:
            return lineage_in(pq.read_schema(stream))
    except pa.ArrowException as error:
        raise damaged_file(path) from error


def read_table(path: str | Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read table `name`, or some of its columns, from the Parquet file `path`.

    Args:
        path: The file.
        name: Name of the table in `SCHEMAS`.
        columns: Names of the columns to read; all columns by default.

    Raises:
        StoreError: The file is missing or damaged, or does not have the columns of the table.
    """
    path = location(path)
    with _readable(path, name) as file:
        return _as_declared(path, name, file, file.read(columns if columns is None else list(columns)), columns)


def read_table_in_parts(path: str | Path, name: str, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Read a table as `read_table`, some row groups at a time."""
    path = location(path)
    with _readable(path, name) as file:
        for first in range(0, max(file.num_row_groups, 1), _GROUPS_AT_ONCE):
            groups = range(first, min(first + _GROUPS_AT_ONCE, file.num_row_groups))
            table = file.read_row_groups(list(groups), columns if columns is None else list(columns))
            yield _as_declared(path, name, file, table, columns)


def column_names(path: str | Path, name: str) -> list[str]:
    """Return the names of the columns of table `name` in the file `path`. Raises as `read_table`."""
    with _readable(location(path), name) as file:
        names: list[str] = file.schema_arrow.names
        return names


@contextmanager
def _readable(path: Path, name: str) -> Iterator[pq.ParquetFile]:
    """Open a file. On a disk, only the columns and row groups that are used are read."""
    with os_errors_explained("read", path):
        try:
            if is_remote(path):
                source: Any = pa.BufferReader(path.read_bytes())
            else:
                path.open("rb").close()
                source = str(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            remedy = f"run the stage that writes {name} first"
            raise StoreError(f"there is no table at {path}", remedy, path=path) from None
    try:
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise damaged_file(path) from error


def _as_declared(
    path: Path, name: str, file: pq.ParquetFile, table: pa.Table, columns: Sequence[str] | None
) -> pa.Table:
    """Check the columns of a file, and return rows of it with those of the ``columns`` that this version has."""
    stored, schema = file.schema_arrow, SCHEMAS[name]
    check_version(path, stored)
    later = columns_since(name, int(_version(stored)))
    expected = [(field.name, field.type) for field in schema if field.name not in later]
    found = [(field.name, stored.field(field.name).type) for field in schema if field.name in stored.names]
    if found != expected or (len(stored) != len(expected) and name not in _MAY_HAVE_MORE_COLUMNS):
        remedy = "delete it and run the same command again"
        raise StoreError(f"{path} does not have the columns of table {name}", remedy, path=path)
    for column in later:
        if columns is None or column in columns:
            table = table.append_column(schema.field(column), pa.nulls(len(table), schema.field(column).type))
    if columns is None and later:
        table = table.select(schema.names).cast(schema)  # columns of former versions are not nullable
    return table.replace_schema_metadata(None)


def _checked(name: str, columns: Mapping[str, Any]) -> pa.Table:
    schema = SCHEMAS[name]
    if missing := [column for column in schema.names if column not in columns]:
        raise StoreError(f"table {name} lacks the columns {missing}")
    more = [column for column in columns if column not in schema.names]
    if more and name not in _MAY_HAVE_MORE_COLUMNS:
        raise StoreError(f"table {name} has no columns {more}: it has {schema.names}")
    arrays: dict[str, pa.Array] = {}
    for field in schema:
        arrays[field.name] = _array(f"column {field.name} of table {name}", columns[field.name], field.type)
        if arrays[field.name].null_count and not field.nullable:
            raise StoreError(f"column {field.name} of table {name} must not be null")
    for column in more:
        arrays[column] = _array(f"column {column} of table {name}", columns[column], None)
    if len(lengths := {len(array) for array in arrays.values()}) != 1:
        raise StoreError(f"the columns of table {name} have different lengths: {sorted(lengths)}")
    fields = [*schema, *(pa.field(column, arrays[column].type) for column in more)]
    return pa.table(list(arrays.values()), schema=pa.schema(fields))


def _array(what: str, values: Any, kind: pa.DataType | None) -> pa.Array:
    try:
        if isinstance(values, pa.ChunkedArray):
            array = values.combine_chunks()
        elif isinstance(values, pa.Array):
            array = values
        else:
            array = pa.array(list(values) if isinstance(values, np.ndarray) and values.ndim == 2 else values)
        if kind is None:
            return array
        # infer the type, then cast: with the type as an argument, pyarrow would truncate 0.5 to the integer 0
        if not _same_kind(array.type, kind):
            raise StoreError(f"{what} cannot be stored as {kind}: it is {array.type}")
        return array.cast(kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise StoreError(f"{what} cannot be stored as {kind or 'an Arrow array'}: {first_line(error)}") from error


def _same_kind(found: pa.DataType, wanted: pa.DataType) -> bool:
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _same_kind(found.value_type, wanted.value_type)
    both_numbers = all(pa.types.is_integer(kind) or pa.types.is_floating(kind) for kind in (found, wanted))
    return both_numbers or found == wanted or pa.types.is_null(found)


def read_tables(paths: Iterable[str | Path], name: str) -> pa.Table:
    """Read table `name` from several files, one after another. There may be no files. Raises as `read_table`."""
    return pa.concat_tables([SCHEMAS[name].empty_table(), *(read_table(path, name) for path in paths)])


def rows_to_columns(rows: Sequence[dict[str, Any]], table: str) -> dict[str, list[Any]]:
    """Convert the rows (dictionaries) of a table to columns. There may be no rows."""
    return {name: [row[name] for row in rows] for name in SCHEMAS[table].names}
