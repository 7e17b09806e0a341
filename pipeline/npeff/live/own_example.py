"""An example of one's own: the fields of a form for the columns of the task's table, and a table of one row.

A task can take such an example if it reads a table, by its option ``data``, with columns of texts or images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from npeff.errors import NpeffError

LONGEST_TEXT = 100_000
"""Largest number of characters of a text."""
_CLASSES_SHOWN = 12
_OF_THE_ROWS = ("split", "columns", "filter", "id_column", "image_folder", "positions_per_row")
"""Options that select or rename rows of the table, which the table of one row does not need."""
_NOT_INPUTS = ("numeric_columns", "category_columns")
"""Options of columns that have a meaning only beside the other rows of the table."""

Kind = Literal["text", "list", "image", "label"]


class OwnExampleError(NpeffError):
    """The run has no form for examples of one's own, or a field is not valid."""


@dataclass(frozen=True)
class Field:
    """A field of the form: a column of the table."""

    column: str
    kind: Kind
    """``list`` is a text with one item per line."""
    option: str
    """The option of the task that names the column."""
    classes: tuple[str, ...] = ()
    """For a label, the names of the classes to choose from; empty if the run has no class names."""


def fields_of(task: str, options: Mapping[str, Any], classes: Sequence[str] = ()) -> list[Field]:
    """Return the fields for a task.

    Args:
        task: Name of the task.
        options: The task's options.
        classes: The names of the classes by their numbers; empty if there are none.

    Raises:
        OwnExampleError: The task reads no table of texts or images.
    """
    found = [] if "data" not in options else list(_fields(options, classes))
    if not any(field.kind in ("text", "list", "image") for field in found):
        raise OwnExampleError(f"the task {task} reads no table of texts or images, so it takes no example of your own")
    return found


def _fields(options: Mapping[str, Any], classes: Sequence[str]) -> list[Field]:
    found = []
    for option, value in options.items():
        if not option.endswith(("_column", "_columns")) or option in (*_NOT_INPUTS, "id_column") or not value:
            continue
        columns = [value] if isinstance(value, str) else list(value)
        kind: Kind = "image" if option == "image_column" else "label" if option == "label_column" else "text"
        if option == "choice_columns" and len(columns) == 1:
            kind = "list"
        of = tuple(classes) if kind == "label" else ()
        found += [Field(str(column), kind, option, of) for column in columns]
    return found


def written(fields: list[Field], given: Mapping[str, str | bytes], path: Path) -> None:
    """Write the table of one row.

    Args:
        fields: The fields.
        given: Texts and image files by column.
        path: The Parquet file to write.

    Raises:
        OwnExampleError: A text is too long, a label is not a class, or there is no image.
    """
    columns: dict[str, pa.Array] = {}
    for field in fields:
        value = given.get(field.column, "")
        if field.kind == "image":
            if not value or isinstance(value, str):
                raise OwnExampleError(f"{field.column} has no image: choose a file")
            columns[field.column] = pa.array([value], pa.binary())
            continue
        text = value if isinstance(value, str) else ""
        if len(text) > LONGEST_TEXT:
            raise OwnExampleError(f"{field.column} has {len(text)} characters: write at most {LONGEST_TEXT}")
        if field.kind == "label":
            if text:
                columns[field.column] = pa.array([_label(field, text)])
        elif field.kind == "list":
            columns[field.column] = pa.array([[line for line in text.split("\n") if line]])
        else:
            columns[field.column] = pa.array([text], pa.string())
    pq.write_table(pa.table(columns), path)


def options_for(
    options: Mapping[str, Any], fields: list[Field], given: Mapping[str, str | bytes], path: Path
) -> dict[str, Any]:
    """Return the options of the task with the table of one row.

    Args:
        options: The task's options.
        fields: The fields.
        given: Texts and image files by column. A label that is not given is unknown.
        path: The table.
    """
    found = {name: value for name, value in options.items() if name not in _OF_THE_ROWS}
    for field in fields:
        if field.kind == "label" and not given.get(field.column):
            del found[field.option]
    return found | {"data": str(path), "limit": 1}


def _label(field: Field, text: str) -> int | str:
    """Return a label as the task reads it: a name of a class if there are names, which is never read as a number."""
    if field.classes and text not in field.classes:
        shown = ", ".join(field.classes[:_CLASSES_SHOWN]) + (", …" if len(field.classes) > _CLASSES_SHOWN else "")
        raise OwnExampleError(f"{field.column} is not a class of this run", f"choose one of the classes {shown}")
    return int(text) if not field.classes and _is_number(text) else text


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
