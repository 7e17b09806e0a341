"""Read-only SQL queries over the tables of a run.

A query may come from an untrusted source, so the connection has access to the tables only: it is in memory, has no
access to files, the network, extensions or Python variables, its settings are locked, and it runs one SELECT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def locked_down(views: Mapping[str, Any]) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a connection with access to the given Arrow tables, datasets or readers only, by name.

    Raises:
        QueryError: DuckDB cannot start, because memory is short.
    """
    try:
        opened = duckdb.connect(":memory:", config=_LOCKED_DOWN)
    except duckdb.Error as error:
        raise QueryError(f"SQL: {first_line(error)}") from error
    with opened as connection:
        for name, view in views.items():
            connection.register(name, view)
        connection.execute("SET enable_progress_bar = false")  # the bar would be printed between the results
        connection.execute("SET enable_progress_bar_print = false")
        connection.execute("SET lock_configuration = true")
        yield connection


def run_sql(tables: RunTables, query: str, most_rows: int | None = None) -> pa.Table:
    """Run one SELECT statement over all tables of the run. Each table is a view with the same name.

    Args:
        tables: The tables.
        query: The statement.
        most_rows: Number of rows after which the query ends. By default, all rows are returned.

    Returns:
        The rows. Names that occur several times get a number.

    Raises:
        QueryError: The query is not one SELECT statement, or DuckDB raises an error (the first line of its message).
    """
    with locked_down({name: tables.dataset(name) for name in tables.names()}) as connection:
        try:
            statements = connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise QueryError("a query must be one SELECT statement over the tables " + ", ".join(tables.names()))
            found = connection.sql(query)
            found = found if most_rows is None else found.limit(most_rows)
            return _without_decimals(_with_distinct_names(found.to_arrow_table()))
        except duckdb.CatalogException as error:
            names = ", ".join(tables.names()) or "none yet"
            raise QueryError(f"SQL: {first_line(error)} (tables: {names})") from error
        except duckdb.Error as error:
            raise QueryError(f"SQL: {first_line(error)}") from error


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
