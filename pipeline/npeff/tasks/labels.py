"""Labels of examples as class numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa

from npeff.tasks.errors import TaskError
from npeff.tasks.tables import TableOptions

LabelValues = Literal["numbers", "names"]


@dataclass(frozen=True, kw_only=True)
class LabelOptions(TableOptions):
    """Options of tasks with labels."""

    label_names: Sequence[str] | None = None
    """Names of the classes in the order of the logits. The default is the model's ``id2label``. Labels are matched
    case-insensitively."""
    label_values: LabelValues | None = None
    """Whether integer labels are class numbers or names of classes. Needed only if they can be both."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_values not in (None, *get_args(LabelValues)):
            raise TaskError(f"label_values must be numbers or names, not {self.label_values!r}")

    def labels(self, rows: pa.Table, column: str | None, names: Sequence[str]) -> pa.Array | pa.ChunkedArray:
        """Return the class number of each row, int64; null if it is unknown, or if there is no column of labels."""
        if column is None:
            return pa.nulls(len(rows), pa.int64())
        try:  # every value is converted once
            labels = rows[column].unify_dictionaries().combine_chunks().dictionary_encode()
        except pa.ArrowNotImplementedError:  # lists, which are no labels
            return pa.array(class_numbers(rows[column].to_pylist(), names, self.data, self.label_values), pa.int64())
        known = class_numbers(labels.dictionary.to_pylist(), names, self.data, self.label_values)
        return pa.array(known, pa.int64()).take(labels.indices)


def distinct_names(names: Iterable[Any]) -> tuple[str, ...]:
    """Return the names of the classes as strings. Raises TaskError if two classes have the same name."""
    found = tuple(map(str, names))
    twice = [name for place, name in enumerate(found) if name in found[:place]]
    if twice:
        raise TaskError(f"two classes have the name {twice[0]!r}: give different names in label_names")
    return found


def class_numbers(
    labels: Sequence[Any], names: Sequence[str], data: str, values: LabelValues | None = None
) -> list[int | None]:
    """Convert labels to class numbers.

    Args:
        labels: Class numbers, or class names in any case; None if unknown.
        names: Names of the classes.
        data: Name of the data, for error messages.
        values: Whether integers are class numbers or names. By default, they are class numbers, and an integer that is
            also the name of another class is refused.

    Raises:
        TaskError: A label is not a class, or can be two classes.
    """
    known: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        known.setdefault(str(name).lower(), []).append(number)
    meanings: dict[str, int | None] = {repr(None): None}
    for label in labels:
        if repr(label) not in meanings:
            meanings[repr(label)] = _class_number(label, names, known, data, values)
    return [meanings[repr(label)] for label in labels]


def _class_number(
    label: Any, names: Sequence[str], known: Mapping[str, Sequence[int]], data: str, values: LabelValues | None
) -> int:
    named = known.get(str(label).lower(), ())
    is_number = isinstance(label, int) and not isinstance(label, bool)
    if is_number and values != "names":
        if values is None and 0 <= label < len(names) and named and list(named) != [label]:
            raise TaskError(
                f"{data}: label {label} is the number of the class {names[label]!r} and the name of class {named[0]}",
                "set label_values to numbers or names",
            )
        if not 0 <= label < len(names):
            remedy = "set label_values: names" if named else "correct it, or filter the rows"
            raise TaskError(f"{data}: label {label} is not one of the model's {len(names)} classes: {remedy}")
        return int(label)
    if not named:
        hint = "give class numbers as integers" if isinstance(label, float) else "give label_names"
        raise TaskError(f"{data}: label {label!r} is not one of {_some(known)}: {hint}")
    if len(named) > 1:
        both = " and ".join(repr(names[number]) for number in named[:2])
        raise TaskError(
            f"{data}: label {label!r} can be the classes {both}, because the case of labels is ignored",
            "give class numbers, or label_names that differ in more than case",
        )
    return named[0]


def _some(names: Collection[str]) -> str:
    """Return the first 20 names, separated by commas."""
    return ", ".join([*list(names)[:20], *(["…"] if len(names) > 20 else [])])
