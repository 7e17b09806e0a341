"""SQL conditions on the columns of the examples, such as ``label = 2 and not correct and source = 'x'``.

If the task has class names, `label_name` and `prediction_name` are further columns. A name with spaces or other special
characters, or a keyword of SQL, is written in double quotes. A condition may contain subqueries over all tables. Like
every query, it has no other access (see `npeff.query.sql`).
"""

from __future__ import annotations

import difflib
import re
import string

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.errors import first_line
from npeff.query.errors import QueryError
from npeff.query.sql import FAILURES, check_text, locked_down
from npeff.query.tables import NAMED_CLASSES, RunTables

_ROWS = "rows_of_examples"
"""Name of the table with the columns in the condition. `examples` is the whole table, for subqueries."""

_LOWER_CASE = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)

_NO_COLUMN = re.compile(r'Referenced column "([^"]*)" not found')
"""Pattern of a message of DuckDB's BinderException, which has no field for the column."""


def matching(tables: RunTables, condition: str) -> NDArray[np.bool_]:
    """Return the mask (N,) of the examples for which a condition is true. A null condition is not true.

    Only the columns in the condition are read, in batches of rows.

    Raises:
        QueryError: The condition is not valid SQL, or contains an unknown column (the message has the nearest names).
    """
    check_text(condition)
    columns = tables.columns("examples")
    own = {_folded(name) for name in columns}
    names = [name for name in NAMED_CLASSES if tables.has("classes") and name not in own]
    text = _folded(condition)
    joined = [name for name in names if name in text]
    needed = {"example", *_named(columns, condition), *(NAMED_CLASSES[name] for name in joined)}
    subqueried = [name for name in tables.names() if name in text] if "select" in text else []
    schema = pa.schema([tables.schema("examples").field(name) for name in columns if name in needed])
    rows = pa.RecordBatchReader.from_batches(schema, tables.scan("examples", schema.names))
    others = {*subqueried, *(["classes"] if joined else [])}
    views = {name: tables.dataset(name) for name in others} | {_ROWS: rows}
    named = [f", {name}s.name AS {name}" for name in joined]
    joins = [f" LEFT JOIN classes {name}s ON {name}s.class = {_ROWS}.{NAMED_CLASSES[name]}" for name in joined]
    try:
        with locked_down(views) as connection:
            every = connection.sql(f"SELECT {_ROWS}.*{''.join(named)} FROM {_ROWS}{''.join(joins)}")  # noqa: S608
            every = every.set_alias("examples")
            found = every.filter(condition).project("example").to_arrow_table()["example"].to_numpy()
    except FAILURES as error:
        raise _explained(error, condition, [*columns, *names]) from error
    mask_N = np.zeros(tables.n_rows("examples"), dtype=bool)
    mask_N[found] = True
    return mask_N


def _folded(text: str) -> str:
    """Return a text with the letters that SQL does not distinguish made equal: those of ASCII."""
    return text.translate(_LOWER_CASE)


def _named(columns: list[str], condition: str) -> list[str]:
    """Return the columns whose names a condition contains, and possibly more.

    Raises:
        QueryError: The condition contains several columns whose names differ in case only.
    """
    written = condition.replace('""', '"')  # a quotation mark in a quoted name is doubled
    folded = _folded(written)
    alike: dict[str, list[str]] = {}
    for name in columns:
        alike.setdefault(_folded(name), []).append(name)
    found: list[str] = []
    for name, group in alike.items():
        if name not in folded:
            found += group[:1] if "columns(" in folded else []  # COLUMNS(...) may stand for any column
            continue
        exact = [each for each in group if each in written] if len(group) > 1 else group
        if len(exact) != 1:
            raise QueryError(
                f"the columns {' and '.join(group)} of the examples differ in case only, which SQL does not "
                "distinguish",
                "write the name of one of them exactly, and do not use another one in the same condition",
            )
        found += exact
    return found


def _explained(error: Exception, condition: str, columns: list[str]) -> QueryError:
    missing = _NO_COLUMN.search(str(error))
    if missing is None:
        return QueryError(f"the condition {condition!r} is not valid SQL: {first_line(error)}")
    near = difflib.get_close_matches(missing[1], columns, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the columns are {', '.join(columns)}"
    return QueryError(
        f"examples have no column '{missing[1]}': {hint} (put text in single quotes, and names in double quotes)"
    )
