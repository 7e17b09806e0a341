"""Types of the options of a built-in task: a value of another type is refused, and not used as something else.

For example, the text ``no`` is true in Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from npeff.tasks.errors import TaskError

_SCALARS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
    NoneType: ((NoneType,), "null"),
}
_LONGEST_VALUE = 60


def check_types(name: str, annotated: Any, options: Mapping[str, Any]) -> None:
    """Check the types of the options of a task.

    Args:
        name: Name of the task, for the message.
        annotated: What has the annotations: the dataclass of the options, or the constructor of the task.
        options: Keyword arguments of the task.

    Raises:
        TaskError: An option has a value of another type than its annotation.
    """
    hints = get_type_hints(annotated)
    for option, value in options.items():
        if option in hints and not _fits(value, hints[option]):
            shown = repr(value) if len(repr(value)) <= _LONGEST_VALUE else type(value).__name__
            raise TaskError(f"task {name!r}: task.options.{option} must be {_described(hints[option])}, not {shown}")


def _fits(value: Any, hint: Any) -> bool:
    if hint in _SCALARS:
        return type(value) in _SCALARS[hint][0]
    origin = get_origin(hint)
    if origin is Sequence:
        return isinstance(value, list | tuple)
    if origin is Mapping:
        return isinstance(value, Mapping)
    if type(None) in get_args(hint):  # a type or None
        return any(_fits(value, each) for each in get_args(hint))
    return True  # one of several words, which the task checks


def _described(hint: Any) -> str:
    if hint in _SCALARS:
        return _SCALARS[hint][1]
    if get_origin(hint) is Sequence:
        return "a list"
    if get_origin(hint) is Mapping:
        return "a mapping"
    return " or ".join(map(_described, get_args(hint)))
