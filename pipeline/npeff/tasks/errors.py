"""The error of a task."""

from __future__ import annotations

from npeff.errors import ItemError


class TaskError(ItemError, ValueError):
    """A task that cannot be used with its options or data. The message contains the fix."""
