"""How many rules are active on an example: options that several tasks with known rules share."""

from __future__ import annotations

import numpy as np

from npeff.tasks.errors import TaskError


def check_active(task: str, n_active: int, most: int) -> None:
    """Check the number of active rules.

    Args:
        task: Name of the task, for the message.
        n_active: The option.
        most: Largest number that the task supports.

    Raises:
        TaskError: `n_active` is not from 1 to `most`.
    """
    if not 1 <= n_active <= most:
        raise TaskError(f"{task}: n_active must be from 1 to {most}, not {n_active}")


def draw_count(n_active: int, at_most: bool, rng: np.random.Generator) -> int:
    """Return the number of active rules of one example: `n_active`, or with `at_most` uniform from 1 to `n_active`."""
    return int(rng.integers(1, n_active + 1)) if at_most else n_active
