"""The groups of inputs of two runs in one table, such as a model before and after it was trained anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.errors import without_values
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.query.tables import RunTables
from npeff.reports.input_groups import GROUPS_SHOWN
from npeff.statistics.paired_bootstrap import Interval, paired_difference

COMPARED = ("label", "covariance", "scope", "spread", "split", "ridge")
"""The settings of the stage `inputs` that both runs must share. The record of the stage contains them."""


@dataclass(frozen=True)
class GroupBeside:
    """Means of a group over the examples that both runs explain."""

    name: str
    information: tuple[float, float]
    """Mean information in nats, in the other run and in this one."""
    share: tuple[float, float]
    """Mean share of the information, in the other run and in this one."""
    difference: Interval
    """Mean difference of the shares, this run minus the other one, with its 95% interval over the examples."""


@dataclass(frozen=True)
class GroupsBeside:
    """The groups of two runs, those with the largest mean shares in this run first."""

    other: str
    n_examples: int
    groups: list[GroupBeside]


def groups_beside(tables: RunTables, other_run: str) -> GroupsBeside:
    """Compare the groups of inputs of two runs over the examples that both explain.

    Args:
        tables: The tables of this run, which has groups.
        other_run: The directory of the other run, or the folder of one of its factorizations.

    Raises:
        QueryError: The other run has no groups, or the two are not comparable.
    """
    other = ComponentStore.open(other_run).tables
    if not other.has("input_groups"):
        raise QueryError(
            f"report.beside: {other.run_dir} has no groups of inputs", f"run `npeff inputs {other.run.argument}` first"
        )
    _refuse_other_settings(tables, other)
    before, after = _groups(other), _groups(tables)
    for run, groups in ((other, before), (tables, after)):
        if len(groups.group_by(["id", "group"]).aggregate([])) < len(groups):
            raise QueryError(
                f"report.beside: several examples of {run.run_dir} have the same id", "give the examples different ids"
            )
    joined = before.join(after, ["id", "group"], join_type="inner", left_suffix=" before", right_suffix=" after")
    joined = joined.sort_by([("group", "ascending"), ("id", "ascending")])
    if not len(joined):
        raise QueryError(
            f"report.beside: no example with a group of inputs is explained both in {tables.run_dir} and in "
            f"{other.run_dir}",
            "use runs of the same task, and set inputs.examples to all in both",
        )
    found = [_beside(name, rows) for name, rows in _by_group(joined)]
    found.sort(key=lambda group: (-group.share[1], group.name))
    n_examples = pc.count_distinct(joined["id"]).as_py()
    return GroupsBeside(without_values(other.run.argument), n_examples, found[:GROUPS_SHOWN])


def _refuse_other_settings(tables: RunTables, other: RunTables) -> None:
    """Check that both runs have the same settings of the stage. Records of earlier versions have only some of them."""
    mine, theirs = tables.record("inputs"), other.record("inputs")
    different = [key for key in COMPARED if key in mine and key in theirs and mine[key] != theirs[key]]
    if different:
        key = different[0]
        raise QueryError(
            f"report.beside: inputs.{key} is {mine[key]} in {tables.run_dir} and {theirs[key]} in {other.run_dir}",
            "give both runs the same settings of inputs",
        )


def _groups(tables: RunTables) -> pa.Table:
    """Return id, group, share and information of all explained examples with a share."""
    rows = tables.read("input_groups", ["example", "group", "share", "information"], pc.field("share").is_valid())
    ids = tables.read("examples", ["example", "id"], pc.field("example").isin(rows["example"].unique()))
    return rows.join(ids, "example", join_type="inner").drop_columns(["example"])


def _by_group(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    for name in rows["group"].unique().to_pylist():
        yield name, rows.filter(pc.equal(rows["group"], name))


def _beside(name: str, rows: pa.Table) -> GroupBeside:
    def values(column: str, when: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = rows[f"{column} {when}"].to_numpy().astype(np.float64)
        return found

    before, after = values("share", "before"), values("share", "after")
    return GroupBeside(
        name=name,
        information=(float(values("information", "before").mean()), float(values("information", "after").mean())),
        share=(float(before.mean()), float(after.mean())),
        difference=paired_difference(after, before),
    )
