"""The table of coefficients, which lists the examples of component 0, then 1, ..., each from the largest down.

What a question needs of it is few groups of rows, found by their statistics, or one walk over all of them.
N examples, K components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.query.tables import RunTables

_TABLE = "coefficients"
_COLUMNS = ("component", "example", "coefficient")


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one component; another of the same component may follow."""

    component: int
    examples: NDArray[np.int64]
    coefficients: NDArray[np.float64]
    """Descending."""


def runs_of(tables: RunTables, component: int) -> Iterator[Run]:
    """The rows of one component, from the largest coefficient down, a group at a time and only as far as one goes."""
    for group in tables.groups_with(_TABLE, "component", [component]):
        for run in _runs(tables.read_groups(_TABLE, [group], _COLUMNS)):
            if run.component == component:
                yield run


def all_runs(tables: RunTables) -> Iterator[Run]:
    """Every row, in order, with a bounded number of them in memory."""
    for batch in tables.scan(_TABLE, _COLUMNS):
        yield from _runs(batch)


def n_larger(tables: RunTables, components: Sequence[int], coefficients: Sequence[float]) -> list[int]:
    """For each of some components, how many examples have more of it than a coefficient; all in one reading."""
    bounds = dict(zip(components, coefficients, strict=True))
    counts = dict.fromkeys(components, 0)
    (first, last), (least, _) = (tables.bounds(_TABLE, column) for column in ("component", "coefficient"))
    to_read = []
    for group in tables.groups_with(_TABLE, "component", list(components)):
        component = int(first[group]) if first[group] == last[group] else None
        if component is not None and least[group] > bounds[component]:
            counts[component] += tables.file(_TABLE).metadata.row_group(group).num_rows
        else:
            to_read.append(group)
    for run in _runs(tables.read_groups(_TABLE, to_read, _COLUMNS)) if to_read else ():
        if run.component in bounds:
            counts[run.component] += int(np.searchsorted(-run.coefficients, -bounds[run.component], "left"))
    return [counts[component] for component in components]


def _runs(rows: pa.Table | pa.RecordBatch) -> Iterator[Run]:
    component, example, coefficient = (np.asarray(rows[name]) for name in _COLUMNS)
    starts = np.flatnonzero(np.diff(component, prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(component)], strict=True):
        yield Run(int(component[start]), example[start:stop], coefficient[start:stop])
