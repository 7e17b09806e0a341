"""Bounds of numeric options, and the errors that name the options."""

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
    """An option has a value that is not allowed, or options contradict each other. The message says what to change."""


class OutOfBoundsError(OptionError):
    """The values of some options are out of their bounds.

    Attributes:
        problems: for the name of each such option the bound that its value violates, as a phrase, and the value.
    """

    def __init__(self, problems: dict[str, tuple[str, Any]]) -> None:
        super().__init__("; ".join(f"{name} {bound}, not {value!r}" for name, (bound, value) in problems.items()))
        self.problems = problems


def check_bounds(options: object, **bounds: Bounds) -> None:
    """Compare attributes of ``options`` with their bounds. None is within all bounds.

    Raises:
        OutOfBoundsError: with the first violated bound of every attribute that violates one.
    """
    problems: dict[str, tuple[str, Any]] = {}
    for name, limits in bounds.items():
        value = getattr(options, name)
        for relation, limit in limits.items():
            if value is not None and not _HOLDS[relation](value, limit):
                problems.setdefault(name, (f"must be {relation} {limit:g}", value))
    if problems:
        raise OutOfBoundsError(problems)
