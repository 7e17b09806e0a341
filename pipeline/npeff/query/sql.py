"""SQL over a run's tables, for reading only.

The query may come from anybody, so the connection has nothing but the tables: it lives in memory, sees no files, no
network, no extensions and no Python variables, its settings are locked, and it runs one SELECT.
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
    """A connection that sees these Arrow tables, data sets or readers, by name, and nothing else."""
    with duckdb.connect(":memory:", config=_LOCKED_DOWN) as connection:
        for name, view in views.items():
            connection.register(name, view)
        connection.execute("SET enable_progress_bar = false")  # which would be printed among the answers
        connection.execute("SET enable_progress_bar_print = false")
        connection.execute("SET lock_configuration = true")
        yield connection


def run_sql(tables: RunTables, query: str) -> pa.Table:
    """Answer one SELECT over all tables of the run; every table is a view of its own name.

    Raises:
        QueryError: not exactly one SELECT, or DuckDB refuses it (the first line of its message).
    """
    with locked_down({name: tables.dataset(name) for name in tables.names()}) as connection:
        try:
            statements = connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise QueryError("a query is one SELECT statement over the tables " + ", ".join(tables.names()))
            return _without_decimals(_with_distinct_names(connection.sql(query).to_arrow_table()))
        except duckdb.CatalogException as error:
            there = ", ".join(tables.names()) or "none yet"
            raise QueryError(f"SQL: {first_line(error)} (tables: {there})") from error
        except duckdb.Error as error:
            raise QueryError(f"SQL: {first_line(error)}") from error


def _with_distinct_names(table: pa.Table) -> pa.Table:
    """A join may give two columns of one name, which neither JSON nor Parquet can hold: the second becomes name_2."""
    names: list[str] = []
    for name in table.column_names:
        distinct, number = name, 1
        while distinct in names:
            number += 1
            distinct = f"{name}_{number}"
        names.append(distinct)
    return table.rename_columns(names)


def _without_decimals(table: pa.Table) -> pa.Table:
    """DuckDB sums integers into 128 bits, which Arrow shows as decimals and JSON cannot: make them int64,
    or float64 where they have a fraction or do not fit."""
    for position, field in enumerate(table.schema):
        if pa.types.is_decimal(field.type):
            column = table.column(position)
            try:
                plain = column.cast(pa.int64())
            except pa.ArrowInvalid:
                plain = column.cast(pa.float64())
            table = table.set_column(position, field.name, plain)
    return table
