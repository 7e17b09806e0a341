"""The form of the table of examples that a task returns."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

_REQUIRED = ("id", "label")
_COLUMNS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "id": ("strings", lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)),
    "label": ("class numbers (integers, null where unknown)", pa.types.is_integer),
    "text": ("strings", lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)),
    "image": ("PNG files (binary)", lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind)),
}
"""Columns of the table of examples with a fixed meaning: a description of their values, and a check of their type."""


def problem_of_table(table: pa.Table, n_examples: int) -> str | None:
    """Return what is wrong with a table of examples, as the end of a sentence about it; None if it is right.

    Args:
        table: The table.
        n_examples: Number of examples of the task.
    """
    if len(table) != n_examples:
        return f" must have one row per example, {n_examples}, not {len(table)}"
    for name, (kind, fits) in _COLUMNS.items():
        if name not in table.column_names:
            if name in _REQUIRED:
                return f" has no column {name!r}: it must have {' and '.join(_REQUIRED)}"
        elif not (fits(table[name].type) or (pa.types.is_null(table[name].type) and name != "id")):
            return f": column {name!r} must hold {kind}, not {table[name].type}"
    return ": column 'id' must not be null" if table["id"].null_count else None
