"""The tables of the examples and of the parameters, which the stage `fishers` writes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.runs.directory import RunDirectory
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table, table_lineage, write_table

if TYPE_CHECKING:
    from npeff.gradients import LeftOut


def held_out(n_examples: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Return a mask (N,) of the held-out examples: a seeded random ``fraction`` of all examples, rounded down."""
    chosen = np.random.default_rng([seed, n_examples]).permutation(n_examples)[: int(fraction * n_examples)]
    mask = np.zeros(n_examples, dtype=bool)
    mask[chosen] = True
    return mask


_OF_EXAMPLES = ("labels", "valid", "frobenius_norms", "ranks", "kept_trace", "losses", "logits")
"""Arrays of the Fisher store that are read for the table of examples."""


def write_example_tables(
    run: RunDirectory, examples: pa.Table, class_names: Sequence[str], lineage: str | None = None
) -> None:
    """Write the tables ``examples`` and ``classes`` from the task's table and the stored logits and norms."""
    store = FisherStore.open(run.fishers)
    n_examples = store.plan.n_examples
    stored = store.read_rows(np.arange(n_examples), [name for name in _OF_EXAMPLES if name in store.array_names])
    logits = stored.get("logits")
    predictions = np.zeros(n_examples, np.int64) if logits is None else logits.argmax(axis=1)
    unlabelled, unpredicted = stored["labels"] < 0, ~stored["valid"] | (logits is None)
    config = run.config
    split = split_column(n_examples, config.factorization.held_out_fraction, config.seed)
    columns: dict[str, Any] = {
        "example": np.arange(n_examples),
        "id": examples["id"],
        "label": pa.array(stored["labels"], mask=unlabelled),
        "prediction": pa.array(predictions, mask=unpredicted),
        "correct": pa.array(predictions == stored["labels"], mask=unlabelled | unpredicted),
        "split": split,
        "valid": stored["valid"],
        "fisher_norm": stored["frobenius_norms"],
        "fisher_rank": stored["ranks"],
        "kept_trace": pa.array(stored["kept_trace"], mask=np.isnan(stored["kept_trace"])),
        "loss": pa.array(stored["losses"].astype(np.float64), mask=np.isnan(stored["losses"])),
        "logits": [None] * n_examples if logits is None else logits,
        "image": [None] * n_examples,
        "text": [None] * n_examples,
    }
    own = {name: examples[name] for name in examples.column_names if name in ("image", "text") or name not in columns}
    write_table(run.shared_table("examples"), "examples", columns | own, lineage)
    classes = {"class": range(len(class_names)), "name": list(class_names)}
    write_table(run.shared_table("classes"), "classes", classes, lineage)


def ensure_split(run: RunDirectory) -> None:
    """Write a table of examples for a factorization whose held-out examples are not those of the run's table.

    The run's table has the split of the factorization with which the Fishers were computed.
    """
    shared = run.shared_table("examples")
    if run.home == run.path:  # the former layout, with one factorization
        return
    stored = read_table(shared, "examples", ["split"])["split"]
    config = run.config
    split = split_column(len(stored), config.factorization.held_out_fraction, config.seed)
    own = run.own_examples
    if stored.to_pylist() == split.tolist():
        own.unlink(missing_ok=True)
    elif not own.is_file() or read_table(own, "examples", ["split"])["split"].to_pylist() != split.tolist():
        table = read_table(shared, "examples")
        position = table.column_names.index("split")
        columns = table.set_column(position, "split", pa.array(split))
        write_table(own, "examples", columns, table_lineage(shared))


def split_column(n_examples: int, fraction: float, seed: int) -> NDArray[np.object_]:
    return np.where(held_out(n_examples, fraction, seed), "held_out", "fit").astype(object)


def write_parameter_table(
    run: RunDirectory, shapes: Mapping[str, Sequence[int]], left_out: Mapping[str, LeftOut], lineage: str | None = None
) -> None:
    """Write the table ``parameters``: shapes of the included parameters, and the reasons why others are excluded."""
    taken = [True] * len(shapes) + [False] * len(left_out)
    columns = {
        "parameter": [*shapes, *left_out],
        "shape": ["x".join(map(str, shape)) for shape in shapes.values()] + [None] * len(left_out),
        "size": [math.prod(shape) for shape in shapes.values()] + [None] * len(left_out),
        "taken": taken,
        "reason": [None] * len(shapes) + [why.reason for why in left_out.values()],
    }
    write_table(run.shared_table("parameters"), "parameters", columns, lineage)
