"""Queries of the paths of the stage `scale`."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from npeff.query.tables import RunTables

_ENDS = {"from_id": "from_example", "to_id": "to_example"}


def paths_of(tables: RunTables, component: int | None = None) -> pa.Table:
    """Return the table `paths` with the ids of the examples at the ends.

    Args:
        tables: The tables of the run.
        component: Only the paths of this component. By default, all paths.

    Returns:
        The columns of the table, and from_id and to_id.

    Raises:
        QueryError: The stage `scale` is not complete.
    """
    found = tables.read("paths", None, None if component is None else pc.field("component") == component)
    names = tables.read("examples", ["example", "id"])
    of_example = dict(zip(names["example"].to_pylist(), names["id"].to_pylist(), strict=True))
    for place, (name, end) in enumerate(_ENDS.items()):
        ids = [of_example.get(example) for example in found[end].to_pylist()]
        found = found.add_column(3 + place, name, pa.array(ids, pa.string()))
    return found
