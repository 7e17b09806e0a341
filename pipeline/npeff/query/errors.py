"""The error of a query."""

from __future__ import annotations

from npeff.errors import NpeffError


class QueryError(NpeffError, ValueError):
    """A query that is not valid, or that the run cannot answer. The message is one line."""
