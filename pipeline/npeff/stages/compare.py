"""Comparison of two factorizations: which components are the same.

Shapes: K and L components, D sketch, P parameters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.factorization.matching import match_components
from npeff.query.components import ComponentStore
from npeff.runs.directory import RunDirectory
from npeff.storage.atomic import is_committed


def compare(
    first: ComponentStore | RunDirectory | str | Path, second: ComponentStore | RunDirectory | str | Path
) -> pa.Table:
    """Match the components of two factorizations of one run, or of two runs of one model.

    Every component is in at most one pair. The pairs have the largest sum of |cos| in the sketch.

    Args:
        first: The store of the factorization whose components determine the order of the rows, its run, or its path.
        second: The other factorization.

    Returns:
        One row per pair, and one per component without a match. Columns: component, other_component (null without a
        match), name and other_name (only if a component of either factorization has a name), cosine (in the sketch),
        abs_cosine, direction_cosine (of the directions in parameter space; null unless both are lifted),
        shared_top_examples (number of listed top examples of both; null for runs with other examples). The sign of a
        component is arbitrary.

    Raises:
        QueryError: The components are not comparable: the runs differ in model, parameters, sketch or seed, or
            factorize diagonals.
    """
    first, second = ComponentStore.of(first), ComponentStore.of(second)
    a_KD, b_LD = first.unit_components, second.unit_components
    first.check_comparable(second)
    pairs, _ = match_components(a_KD, b_LD)
    other_of = dict(pairs.tolist())
    shared = _shared_top_examples(first, second)
    directions = _Directions(first, second)
    rows = []
    for component in range(len(a_KD)):
        other = other_of.get(component)
        cosine = None if other is None else float(a_KD[component] @ b_LD[other])
        rows.append(
            {
                "component": component,
                "other_component": other,
                "cosine": cosine,
                "abs_cosine": None if cosine is None else abs(cosine),
                "direction_cosine": None if other is None else directions.cosine(component, other),
                "shared_top_examples": None if other is None or shared is None else int(shared[component, other]),
            }
        )
    unmatched = sorted(set(range(len(b_LD))) - set(other_of.values()))
    rows += [dict.fromkeys(_SCHEMA.names) | {"other_component": other} for other in unmatched]
    return _with_names(pa.Table.from_pylist(rows, schema=_SCHEMA), first, second)


def _with_names(table: pa.Table, first: ComponentStore, second: ComponentStore) -> pa.Table:
    """Return the table with the names of the components after their numbers, if there are any names."""
    known = [store.annotations for store in (first, second)]
    if not any(each.name for of_column in known for each in of_column.of_component.values()):
        return table
    for place, (column, of_column) in enumerate(zip(("component", "other_component"), known, strict=True)):
        names = [None if number is None else of_column.name(number) for number in table[column].to_pylist()]
        table = table.add_column(2 + place, ("name", "other_name")[place], pa.array(names, pa.string()))
    return table


_SCHEMA = pa.schema(
    [
        ("component", pa.int64()),
        ("other_component", pa.int64()),
        ("cosine", pa.float64()),
        ("abs_cosine", pa.float64()),
        ("direction_cosine", pa.float64()),
        ("shared_top_examples", pa.int64()),
    ]
)


def _shared_top_examples(first: ComponentStore, second: ComponentStore) -> NDArray[np.int64] | None:
    """Return the numbers of top examples that two components share (K, L), or None for other examples."""
    ids = [store.tables.read("examples", ["id"])["id"] for store in (first, second)]
    if not ids[0].equals(ids[1]):
        return None
    mine, theirs = (_memberships(store, len(ids[0])) for store in (first, second))
    shared: NDArray[np.int64] = mine @ theirs.T
    return shared


def _memberships(store: ComponentStore, n_examples: int) -> NDArray[np.int64]:
    rows = store.tables.read("top_examples", ["component", "example"])
    found = np.zeros((len(store.unit_components), n_examples), dtype=np.int64)
    found[rows["component"].to_numpy(), rows["example"].to_numpy()] = 1
    return found


class _Directions:
    """The directions of the components of two factorizations that are lifted."""

    def __init__(self, *stores: ComponentStore) -> None:
        committed = all(is_committed(store.run.directions) for store in stores)
        self._stores = [store.direction_store for store in stores] if committed else None
        self._lifted = [_lifted(store) for store in stores]

    def cosine(self, component: int, other: int) -> float | None:
        """Return the cosine of two unit directions; None unless both are lifted."""
        if self._stores is None or component not in self._lifted[0] or other not in self._lifted[1]:
            return None
        a, b = self._stores[0].read(component), self._stores[1].read(other)
        return sum(float(np.vdot(a[name].astype(np.float64), b[name].astype(np.float64))) for name in a)


def _lifted(store: ComponentStore) -> set[int]:
    record: dict[str, Any] = store.tables.record("lift")
    return set(record.get("components", range(record.get("n_components", 0))))
