"""Conditions on examples: ``label = 2 and not correct and source = 'x'``, in SQL, over the columns of their table.

Beside these columns there are `label_name` and `prediction_name`, where the task has names for its classes. A condition
may ask the other tables in subqueries; like every query it can do nothing else (see `npeff.query.sql`).
"""

from __future__ import annotations

import difflib
import re

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.errors import first_line
from npeff.query.errors import QueryError
from npeff.query.sql import locked_down
from npeff.query.tables import NAMED_CLASSES, RunTables

_NO_COLUMN = re.compile(r'Referenced column "([^"]*)" not found')
"""In the text of DuckDB's BinderException, which names the column in no field."""


def matching(tables: RunTables, condition: str) -> NDArray[np.bool_]:
    """Which examples (N,) a condition holds for; where it is neither true nor false (null), it does not.

    Only the columns that it names are read, some rows at a time.

    Raises:
        QueryError: it is no condition, or names a column that is not there (the message has the nearest names).
    """
    columns = tables.columns("examples")
    names = [name for name in NAMED_CLASSES if tables.has("classes")]
    spoken_of = condition.lower()
    needed = {"example"} | {name for name in columns if name.lower() in spoken_of}
    joined = [name for name in names if name in spoken_of]
    needed |= {NAMED_CLASSES[name] for name in joined}
    asked_too = [name for name in tables.names() if name in spoken_of] if "select" in spoken_of else []
    schema = pa.schema([tables.schema("examples").field(name) for name in columns if name in needed])
    rows = pa.RecordBatchReader.from_batches(schema, tables.scan("examples", schema.names))
    views = {name: tables.dataset(name) for name in {*asked_too, *(["classes"] if joined else [])}} | {"examples": rows}
    named = [f", {name}s.name AS {name}" for name in joined]
    joins = [f" LEFT JOIN classes {name}s ON {name}s.class = examples.{NAMED_CLASSES[name]}" for name in joined]
    with locked_down(views) as connection:
        try:
            every = connection.sql(f"SELECT examples.*{''.join(named)} FROM examples{''.join(joins)}")  # noqa: S608
            found = every.filter(condition).project("example").to_arrow_table()["example"].to_numpy()
        except duckdb.Error as error:
            raise _explained(error, condition, [*columns, *names]) from error
    mask_N = np.zeros(tables.n_rows("examples"), dtype=bool)
    mask_N[found] = True
    return mask_N


def _explained(error: duckdb.Error, condition: str, columns: list[str]) -> QueryError:
    missing = _NO_COLUMN.search(str(error))
    if missing is None:
        return QueryError(f"the condition {condition!r} is not one that SQL understands: {first_line(error)}")
    near = difflib.get_close_matches(missing[1], columns, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(columns)}"
    return QueryError(f"examples have no column '{missing[1]}': {hint} (text goes into single quotes)")
