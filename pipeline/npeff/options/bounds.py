"""Bounds of numeric options, and the errors for invalid options."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

from npeff.errors import NpeffError

Relation = Literal["greater than", "greater than or equal to", "less than", "less than or equal to"]
Bounds = Mapping[Relation, float]

POSITIVE: Bounds = {"greater than": 0}

_HOLDS: dict[Relation, Callable[[float, float], bool]] = {
    "greater than": operator.gt,
    "greater than or equal to": operator.ge,
    "less than": operator.lt,
    "less than or equal to": operator.le,
}


class OptionError(NpeffError, ValueError):
    """An option has an invalid value, or two options contradict each other. The message contains the fix."""


class OutOfBoundsError(OptionError):
    """The values of one or more options are out of bounds.

    Attributes:
        problems: Maps the name of each invalid option to a pair: the violated bound as a phrase, and the value.
    """

    def __init__(self, problems: dict[str, tuple[str, Any]]) -> None:
        super().__init__("; ".join(f"{name} {bound}, not {value!r}" for name, (bound, value) in problems.items()))
        self.problems = problems


def check_bounds(options: object, **bounds: Bounds) -> None:
    """Check that attributes of ``options`` are within their bounds. The value None satisfies every bound.

    Args:
        options: Object whose attributes are checked.
        **bounds: Bounds of each attribute, by attribute name.

    Raises:
        OutOfBoundsError: One or more attributes are out of bounds. The error lists the first violated bound of each.
    """
    problems: dict[str, tuple[str, Any]] = {}
    for name, limits in bounds.items():
        value = getattr(options, name)
        for relation, limit in limits.items():
            if value is not None and not _HOLDS[relation](value, limit):
                problems.setdefault(name, (f"must be {relation} {limit:g}", value))
    if problems:
        raise OutOfBoundsError(problems)
