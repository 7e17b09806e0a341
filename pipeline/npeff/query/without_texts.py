"""A run without the texts and images of its examples, to share results of data that must not be passed on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from npeff.query.components import ComponentStore
from npeff.query.tables import EXAMPLE_COLUMNS, RunTables

_HIDDEN_TABLES = frozenset({"position_shares", "input_shares"})
"""Tables with tokens of the examples, or with maps of their images."""
_HIDDEN_ROWS = frozenset({"morphs"})
"""Tables whose rows are images."""
_HIDDEN_COLUMNS = {"examples": ("text", "image")}


def without_texts(store: ComponentStore) -> ComponentStore:
    """Return the run without the texts, the images and the tokens of its examples, and without columns of the task.

    Numbers, ids, labels and the names of classes stay.
    """
    found = ComponentStore(store.run)
    found.tables = _Tables(store.run)
    return found


class _Tables(RunTables):
    def names(self) -> list[str]:
        return [name for name in super().names() if name not in _HIDDEN_TABLES]

    def has(self, name: str) -> bool:
        return name not in _HIDDEN_TABLES and super().has(name)

    def schema(self, name: str) -> pa.Schema:
        schema = super().schema(name)
        return pa.schema([schema.field(column) for column in EXAMPLE_COLUMNS]) if name == "examples" else schema

    def read(self, name: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        return _hidden(name, super().read(name, columns, where))

    def read_groups(self, name: str, groups: Sequence[int], columns: Iterable[str]) -> pa.Table:
        return _hidden(name, super().read_groups(name, groups, columns))

    def scan(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for batch in super().scan(name, columns):
            yield from _hidden(name, pa.Table.from_batches([batch])).to_batches()


def _hidden(name: str, table: pa.Table) -> pa.Table:
    if name in _HIDDEN_ROWS:
        return table.slice(0, 0)
    for column in _HIDDEN_COLUMNS.get(name, ()):
        if column in table.column_names:
            place = table.column_names.index(column)
            table = table.set_column(place, table.field(place), pa.nulls(len(table), table.field(place).type))
    return table
