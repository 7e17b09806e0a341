"""What a query can do wrong, as one line that says what to do about it."""

from __future__ import annotations

from npeff.errors import NpeffError


class QueryError(NpeffError, ValueError):
    """A question that this run cannot answer: the message is one clear line for the person who asked."""
