"""Read-only SQL queries over the tables of a run.

A query may come from an untrusted source, so the connection has access to the tables only: it is in memory, has no
access to files, the network, extensions or Python variables, its settings are locked, and it runs one SELECT. The time
of a query and the size of its result are limited.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import accumulate
from typing import Any

import duckdb
import pyarrow as pa

from npeff.errors import first_line
from npeff.query.errors import QueryError
from npeff.query.tables import RunTables

_LOCKED_DOWN: dict[str, str | bool | int | float | list[str]] = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "temp_directory": "",
}


FAILURES = (duckdb.Error, pa.ArrowException, OSError)
"""Errors of a query. The errors of DuckDB while a result is read are those of Arrow."""

TIMEOUT_S = 300.0
"""Time in seconds after which a query is stopped."""

_MOST_BYTES = 2**30
_MOST_CHARACTERS = 20_000
_DEEPEST = 100
_SIGNS = re.compile(r"(?:[-+][^-+\w]*){300}")
"""A sequence of signs. The time of DuckDB's parser grows with the square of its length, and with that of the depth of
brackets, and the parser cannot be stopped."""
_ROWS_OF_A_BATCH = 100_000


@contextmanager
def locked_down(views: Mapping[str, Any], timeout_s: float = TIMEOUT_S) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a connection with access to the given Arrow tables, datasets or readers only, by name.

    Args:
        views: The tables, datasets or readers.
        timeout_s: Time in seconds after which the body is stopped.

    Raises:
        QueryError: The body was stopped, or DuckDB cannot start, because memory is short.
    """
    try:
        opened = duckdb.connect(":memory:", config=_LOCKED_DOWN)
    except duckdb.Error as error:
        raise QueryError(f"SQL: {first_line(error)}") from error
    with opened as connection:
        for name, view in views.items():
            connection.register(name, view)
        # The bar would be printed between the results. In a notebook without ipywidgets, DuckDB shows none, and refuses
        # to change the setting.
        if connection.sql("SELECT current_setting('enable_progress_bar')").fetchall() != [(False,)]:
            connection.execute("SET enable_progress_bar = false")
            connection.execute("SET enable_progress_bar_print = false")
        connection.execute("SET lock_configuration = true")
        late = threading.Event()

        def stop() -> None:
            late.set()
            with suppress(duckdb.Error):  # the connection may just have been closed
                connection.interrupt()

        timer = threading.Timer(timeout_s, stop)
        timer.daemon = True
        timer.start()
        try:
            yield connection
        except FAILURES:
            if not late.is_set():
                raise
            remedy = "ask for less, or read the files of the tables with another program"
            raise QueryError(f"the query took more than {timeout_s:g} s", remedy) from None
        finally:
            timer.cancel()


def run_sql(tables: RunTables, query: str, most_rows: int | None = None, timeout_s: float = TIMEOUT_S) -> pa.Table:
    """Run one SELECT statement over all tables of the run. Each table is a view with the same name.

    If any component has a name or a note, the view `annotations` has the columns component, name and note.

    Args:
        tables: The tables.
        query: The statement.
        most_rows: Number of rows after which the query ends. By default, all rows are returned.
        timeout_s: Time in seconds after which the statement is stopped.

    Returns:
        The rows. Names that occur several times get a number. Values for which Python has no type, such as dates after
        the year 9999, are texts.

    Raises:
        QueryError: The query is not one SELECT statement; it takes too long, or its result is too large; or DuckDB
            raises an error (the first line of its message).
    """
    check_text(query)
    try:
        views = {name: tables.dataset(name) for name in tables.names()} | _annotations(tables)
        with locked_down(views, timeout_s) as connection:
            statements = connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise QueryError("a query must be one SELECT statement over the tables " + ", ".join(tables.names()))
            answer = connection.sql(query)
            found = _read(answer if most_rows is None else answer.limit(most_rows))
            return _with_python_types(_without_decimals(_with_distinct_names(found)), connection)
    except duckdb.CatalogException as error:
        names = ", ".join(tables.names()) or "none yet"
        raise QueryError(f"SQL: {first_line(error)} (tables: {names})") from error
    except FAILURES as error:
        raise QueryError(f"SQL: {first_line(error)}") from error


def _annotations(tables: RunTables) -> dict[str, pa.Table]:
    """Return the names and notes of the components as a view, if there are any."""
    found = tables.annotations.of_component
    kinds = pa.schema([("component", pa.int64()), ("name", pa.string()), ("note", pa.string())])
    rows = [{"component": component, "name": each.name, "note": each.note} for component, each in found.items()]
    return {"annotations": pa.Table.from_pylist(rows, schema=kinds)} if rows else {}


def check_text(query: str) -> None:
    """Check that a query is valid Unicode and that DuckDB parses it in bounded time. Raises QueryError."""
    if len(query) > _MOST_CHARACTERS:
        raise QueryError(f"the query has {len(query)} characters: write at most {_MOST_CHARACTERS}")
    try:
        query.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"character {error.start + 1} of the query is not Unicode: remove it") from None
    depth = accumulate((letter in "([{") - (letter in ")]}") for letter in query)
    if max(depth, default=0) > _DEEPEST or _SIGNS.search(query):
        raise QueryError(
            f"the query has more than {_DEEPEST} nested brackets, or a long sequence of signs: simplify it"
        )


def _read(relation: duckdb.DuckDBPyRelation) -> pa.Table:
    """Return the result of a query. Raises QueryError if it is too large."""
    # the method has another name before DuckDB 1.5
    read = relation.to_arrow_reader if hasattr(relation, "to_arrow_reader") else relation.fetch_arrow_reader
    reader = read(_ROWS_OF_A_BATCH)
    batches, n_bytes = [], 0
    for batch in reader:
        n_bytes += batch.nbytes
        if n_bytes > _MOST_BYTES:
            raise QueryError(f"the result is larger than {_MOST_BYTES >> 30} GiB: add LIMIT to the query")
        batches.append(batch)
    return pa.Table.from_batches(batches, reader.schema)


def _with_distinct_names(table: pa.Table) -> pa.Table:
    """Rename duplicate columns, which neither JSON nor Parquet supports. The second column is name_2."""
    names: list[str] = []
    for name in table.column_names:
        distinct, number = name, 1
        while distinct in names:
            number += 1
            distinct = f"{name}_{number}"
        names.append(distinct)
    return table.rename_columns(names)


def _without_decimals(table: pa.Table) -> pa.Table:
    """Convert decimal columns to int64, or to float64 if they have fractions or overflow.

    DuckDB sums integers in 128 bits, which are decimals in Arrow and which JSON does not support.
    """
    for position, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type):
            column = table.column(position)
            try:
                plain = column.cast(pa.int64())
            except pa.ArrowInvalid:
                plain = column.cast(pa.float64())
            table = table.set_column(position, field.name, plain)
    return table


def _with_python_types(table: pa.Table, connection: duckdb.DuckDBPyConnection) -> pa.Table:
    """Convert the columns with a value for which Python has no type to text, as DuckDB writes it."""
    for position, field in enumerate(table.schema):
        if _is_plain(field.type):
            continue
        column = table.column(position)
        try:
            column.to_pylist()
        except (ValueError, OverflowError, ArithmeticError):
            as_text = connection.from_arrow(pa.table({"value": column})).project("CAST(value AS VARCHAR) AS value")
            table = table.set_column(position, field.name, as_text.to_arrow_table().column(0))
    return table


def _is_plain(kind: pa.DataType) -> bool:
    return not (pa.types.is_temporal(kind) or pa.types.is_interval(kind) or pa.types.is_nested(kind))
