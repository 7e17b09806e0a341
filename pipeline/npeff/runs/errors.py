"""The error of a run directory."""

from __future__ import annotations

from npeff.errors import NpeffError


class RunDirectoryError(NpeffError):
    """A run directory that cannot be used; the message says why and what to do."""
