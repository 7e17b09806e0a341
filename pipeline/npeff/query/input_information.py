"""Queries of the Fisher information of the inputs: of one example, or of the top examples of a component."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from npeff.query.errors import QueryError
from npeff.query.tables import RunTables

_LARGEST_FIRST = [("share", "descending"), ("position", "ascending")]


def explained_examples(tables: RunTables) -> pa.Table:
    """Return the table `inputs` with the ids of the examples and the names of the classes."""
    found, ids = tables.read("inputs"), tables.read("examples", ["id"])["id"]
    classes = tables.read("classes")
    names = dict(zip(classes["class"].to_pylist(), classes["name"].to_pylist(), strict=True))
    named = pa.array([names.get(number) for number in found["class"].to_pylist()], pa.string())
    found = found.add_column(1, "id", ids.take(found["example"]))
    return found.add_column(found.column_names.index("class") + 1, "class_name", named)


def shares_of_example(tables: RunTables, example: int) -> pa.Table:
    """Return the rows of an example in the table `input_shares`, largest share first.

    Raises:
        QueryError: The stage `inputs` did not explain the example, or its gradients are not finite.
    """
    found = tables.read("input_shares", None, pc.field("example") == example)
    if not len(found):
        finite = tables.read("inputs", ["information"], pc.field("example") == example)["information"]
        if len(finite):
            raise QueryError(f"example {example} has logits or gradients at its inputs that are not finite")
        raise QueryError(
            f"the inputs of example {example} are not explained",
            f"set inputs.examples to all in the run file, and run `npeff inputs {tables.run.argument}`",
        )
    return found.drop_columns(["example"]).sort_by(_LARGEST_FIRST)


def mean_shares(tables: RunTables, examples: Sequence[int]) -> pa.Table:
    """Return the mean share of each position of some examples, largest mean first.

    Positions with a token or a name, such as words and columns, are grouped by it, and the shares of equal tokens of
    one example are added. Other positions, such as pixels, are grouped by their number.

    Args:
        tables: The tables of the run.
        examples: The numbers of the examples.

    Returns:
        Columns: position (the smallest number), token, group (the first in alphabetic order), n_examples (with this
        position), share (the mean over these examples), information (in nats, likewise).

    Raises:
        QueryError: The stage `inputs` explained none of the examples.
    """
    columns = ["example", "position", "token", "group", "share", "information"]
    rows = tables.read("input_shares", columns, pc.field("example").isin(list(examples)))
    if not len(rows):
        raise QueryError(
            "the inputs of the component's top examples are not explained",
            f"set inputs.examples to top in the run file, and run `npeff inputs {tables.run.argument}`",
        )
    named = rows["token"].null_count < len(rows)
    by = "token" if named else "position"
    keys = ["example", by]
    sums = rows.group_by(keys).aggregate(
        [("share", "sum"), ("information", "sum"), ("position", "min"), ("group", "min")]
    )
    means = sums.group_by(by).aggregate(
        [
            *(("share_sum", "mean"), ("information_sum", "mean"), ("position_min", "min"), ("group_min", "min")),
            ("example", "count"),
        ]
    )
    nothing = pa.nulls(len(means), pa.string())
    return pa.table(
        {
            "position": means["position_min_min"],
            "token": means["token"] if named else nothing,
            "group": means["group_min_min"],
            "n_examples": means["example_count"],
            "share": means["share_sum_mean"],
            "information": means["information_sum_mean"],
        }
    ).sort_by(_LARGEST_FIRST)
