"""Bounds of numeric options, and the errors for invalid options."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

from npeff.errors import NpeffError

Relation = Literal["greater than", "greater than or equal to", "less than", "less than or equal to"]
Bounds = Mapping[Relation, float]

LARGEST_COUNT = 2**31 - 1
"""Largest number of components, examples, steps, buckets or MiB. Libraries of linear algebra have 32-bit indices, and a
product of two such numbers fits in 64 bits."""

LARGEST_SHARE = 4096
"""Largest number of workers, and of CPU cores and GPUs of a worker. Each is a process, a thread or a device."""

LARGEST_TIME_S = 366 * 24 * 3600
"""Largest timeout in seconds, a year. Timers of the operating system overflow for much longer ones."""

LARGEST_STEP = 1e9
"""Largest length of a step in parameter space. Products of four parameters of this size are finite in float32."""

COUNT: Bounds = {"greater than": 0, "less than or equal to": LARGEST_COUNT}

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
        super().__init__("; ".join(f"{name} {bound}, not {shown(value)}" for name, (bound, value) in problems.items()))
        self.problems = problems


def check_bounds(options: object, **bounds: Bounds) -> None:
    """Check that attributes of ``options`` are finite and within their bounds. The value None satisfies every bound.

    Args:
        options: Object whose attributes are checked.
        **bounds: Bounds of each attribute, by attribute name.

    Raises:
        OutOfBoundsError: One or more attributes are out of bounds. The error lists the first violated bound of each.
    """
    problems: dict[str, tuple[str, Any]] = {}
    for name, limits in bounds.items():
        value = getattr(options, name)
        if isinstance(value, float) and not math.isfinite(value):
            problems[name] = ("must be a finite number", value)
            continue
        for relation, limit in limits.items():
            if value is not None and not _HOLDS[relation](value, limit):
                problems.setdefault(name, (f"must be {relation} {_shown(limit)}", value))
    if problems:
        raise OutOfBoundsError(problems)


def shown(value: Any) -> str:
    """Return the beginning of a value as it may be written in Python."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # Python converts no integer of more than 4300 digits
        return "a number with too many digits"


def _shown(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"
