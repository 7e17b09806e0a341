"""Means of the table `input_groups`: of all explained examples, and of the top examples of each component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npeff.query.tables import RunTables

GROUPS_SHOWN = 20


@dataclass(frozen=True)
class GroupMean:
    """A group of positions, such as a modality, one of two texts, or a column."""

    name: str
    n_examples: int
    share: float
    """Mean share of the information, over the examples that have the group and some information."""
    information: float
    """Mean information in nats, over the examples that have the group."""


@dataclass(frozen=True)
class GroupOfComponent:
    """A group among the top examples of a component."""

    name: str
    share: float
    """Mean share over the top examples."""
    base: float
    """Mean share over all explained examples."""


@dataclass(frozen=True)
class InputGroups:
    """The groups with the largest mean shares."""

    n_groups: int
    shown: list[GroupMean]
    of_component: dict[int, list[GroupOfComponent]]
    """By component, the groups in the order of `shown`. Components whose top examples are not explained are absent."""

    def largest_for(self, name: str) -> tuple[int, float] | None:
        """Return the component with the largest mean share of a group, and this share."""
        shares = [
            (group.share, -component)
            for component, groups in self.of_component.items()
            for group in groups
            if group.name == name
        ]
        share, component = max(shares, default=(0.0, 0))
        return (-component, share) if shares else None


def input_groups(tables: RunTables, members: Mapping[int, Sequence[int]]) -> InputGroups | None:
    """Read the table `input_groups`; None if it has no rows.

    Args:
        tables: The tables of the run.
        members: The top examples of each component.
    """
    if not tables.has("input_groups"):
        return None
    found = _means(tables)
    if not found:
        return None
    shown = sorted(found, key=lambda group: (-group.share, group.name))[:GROUPS_SHOWN]
    return InputGroups(len(found), shown, _by_component(tables, members, shown))


def _means(tables: RunTables) -> list[GroupMean]:
    """Return the means over all examples. The rows are read in batches."""
    columns = ("share", "information")
    parts = [
        pa.table(batch).group_by("group").aggregate([(name, of) for name in columns for of in ("sum", "count")])
        for batch in tables.scan("input_groups", ["group", *columns])
    ]
    if not parts:
        return []
    names = [f"{name}_{of}" for name in columns for of in ("sum", "count")]
    rows = pa.concat_tables(parts).group_by("group").aggregate([(name, "sum") for name in names]).to_pylist()
    return [
        GroupMean(
            name=row["group"],
            n_examples=row["information_count_sum"],
            share=row["share_sum_sum"] / row["share_count_sum"],
            information=row["information_sum_sum"] / row["information_count_sum"],
        )
        for row in rows
        if row["share_count_sum"]
    ]


def _by_component(
    tables: RunTables, members: Mapping[int, Sequence[int]], shown: Sequence[GroupMean]
) -> dict[int, list[GroupOfComponent]]:
    listed = sorted({example for examples in members.values() for example in examples})
    where = pc.field("example").isin(listed) & pc.field("group").isin([group.name for group in shown])
    rows = tables.read("input_groups", ["example", "group", "share"], where & pc.field("share").is_valid())
    examples, shares = rows["example"].to_numpy(), rows["share"].to_numpy()
    groups = pc.index_in(rows["group"], value_set=pa.array([group.name for group in shown])).to_numpy()
    found: dict[int, list[GroupOfComponent]] = {}
    for component, chosen in members.items():
        here = np.isin(examples, np.asarray(chosen, np.int64))
        n = np.bincount(groups[here], minlength=len(shown))
        means = np.bincount(groups[here], weights=shares[here], minlength=len(shown)) / np.maximum(n, 1)
        of = [GroupOfComponent(group.name, float(means[i]), group.share) for i, group in enumerate(shown) if n[i]]
        if of:
            found[component] = of
    return found
