"""Texts of the tokens that are labels and predictions of a language model, for display."""

from __future__ import annotations

from collections.abc import Iterator

from npeff.query.tables import RunTables
from npeff.reports.texts import visible

_PLACES = (
    ("prediction_shifts", "class", "name"),
    ("example_shifts", "class_before", "name_before"),
    ("example_shifts", "class_after", "name_after"),
    ("examples", "label", "token"),
)
"""Tables, each with a column of classes and a column of their texts."""


def token_names(tables: RunTables) -> dict[int, str]:
    """Return the texts of tokens by number, as far as the tables of a run have them.

    The table `classes` does not have the vocabulary. The texts are those of the tables of the verification, and of the
    column `token` of the examples, if each example is one token.
    """
    found = dict[int, str]()
    for number, name in _named(tables):
        if name is not None and number is not None:
            found.setdefault(number, visible(name))
    return found


def _named(tables: RunTables) -> Iterator[tuple[int | None, str | None]]:
    for table, *pair in _PLACES:
        if tables.has(table) and set(pair) <= set(tables.columns(table)):
            pairs = tables.read(table, pair).group_by(pair).aggregate([])
            yield from zip(*(pairs[name].to_pylist() for name in pair), strict=True)
