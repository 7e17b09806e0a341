"""Reading of the table of coefficients, which is ordered by component and, within a component, by descending value.

A query reads a few row groups, which it finds by their statistics, or all row groups once.
N examples, K components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.query.tables import RunTables

_TABLE = "coefficients"
_COLUMNS = ("component", "example", "coefficient")


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one component. A component may have several consecutive runs."""

    component: int
    examples: NDArray[np.int64]
    coefficients: NDArray[np.float64]
    """Descending."""


def runs_of(tables: RunTables, component: int) -> Iterator[Run]:
    """Yield the rows of one component in descending order. Row groups are read one at a time, on demand."""
    for group in tables.groups_with(_TABLE, "component", [component]):
        for run in _runs(tables.read_groups(_TABLE, [group], _COLUMNS)):
            if run.component == component:
                yield run


def all_runs(tables: RunTables) -> Iterator[Run]:
    """Yield all rows in order, with a bounded number of rows in memory."""
    for batch in tables.scan(_TABLE, _COLUMNS):
        yield from _runs(batch)


def n_larger(tables: RunTables, components: Sequence[int], coefficients: Sequence[float]) -> list[int]:
    """Count the examples with a larger coefficient than a given one, for each of some components, in one pass.

    Args:
        tables: The tables of the run.
        components: The components.
        coefficients: A coefficient for each component.
    """
    bounds = dict(zip(components, coefficients, strict=True))
    counts = dict.fromkeys(components, 0)
    (first, last), (least, _) = (tables.bounds(_TABLE, column) for column in ("component", "coefficient"))
    to_read = []
    for group in tables.groups_with(_TABLE, "component", components):
        component = first[group]
        if component is not None and component == last[group] and least[group] > bounds[component]:
            counts[component] += tables.file(_TABLE).metadata.row_group(group).num_rows
        else:
            to_read.append(group)
    rows = tables.read_groups(_TABLE, to_read, ("component", "coefficient"))
    descending = np.asarray(rows["coefficient"])
    for component, where in _stretches(rows):
        if component in bounds:
            counts[component] += int(np.searchsorted(-descending[where], -bounds[component], "left"))
    return [counts[component] for component in components]


def _runs(rows: pa.Table | pa.RecordBatch) -> Iterator[Run]:
    example, coefficient = np.asarray(rows["example"]), np.asarray(rows["coefficient"])
    for component, where in _stretches(rows):
        yield Run(component, example[where], coefficient[where])


def _stretches(rows: pa.Table | pa.RecordBatch) -> Iterator[tuple[int, slice]]:
    """Yield each component with the slice of its rows."""
    component = np.asarray(rows["component"])
    starts = np.flatnonzero(component[1:] != component[:-1]) + 1
    for start, stop in zip([0, *starts.tolist()], [*starts.tolist(), len(component)], strict=True):
        if start < stop:
            yield int(component[start]), slice(start, stop)
