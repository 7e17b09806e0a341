"""The tables of the examples and of the parameters, which the stage `fishers` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.runs.directory import RunDirectory
from npeff.store.fisher_store import FisherStore
from npeff.store.splits import is_fit
from npeff.store.tables import read_table, read_table_in_parts, table_lineage, write_table, write_table_in_parts

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
    run: RunDirectory, parts: Iterable[pa.Table], class_names: Sequence[str], lineage: str | None = None
) -> None:
    """Write the tables ``examples`` and ``classes`` from the parts of the task's table, and stored logits and norms."""
    store, config = FisherStore.open(run.fishers), run.config
    held_out_N = held_out(store.plan.n_examples, config.factorization.held_out_fraction, config.seed)
    examples = (_part_of_examples(store, held_out_N, *part) for part in _with_starts(parts))
    write_table_in_parts(run.shared_table("examples"), "examples", examples, lineage)
    classes = {"class": range(len(class_names)), "name": list(class_names)}
    write_table(run.shared_table("classes"), "classes", classes, lineage)


def _with_starts(parts: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Yield parts of a table, each with the number of its first row."""
    start = 0
    for part in parts:
        yield start, part
        start += len(part)


def _part_of_examples(
    store: FisherStore, held_out_N: NDArray[np.bool_], start: int, examples: pa.Table
) -> dict[str, Any]:
    """Return the columns of the table ``examples`` for rows of the task's table, of which the first is ``start``."""
    numbers = np.arange(start, start + len(examples))
    stored = store.read_rows(numbers, [name for name in _OF_EXAMPLES if name in store.array_names])
    logits = stored.get("logits")
    predictions = np.zeros(len(numbers), np.int64) if logits is None else logits.argmax(axis=1)
    unlabelled, unpredicted = stored["labels"] < 0, ~stored["valid"] | (logits is None)
    columns: dict[str, Any] = {
        "example": numbers,
        "id": examples["id"],
        "label": pa.array(stored["labels"], mask=unlabelled),
        "prediction": pa.array(predictions, mask=unpredicted),
        "correct": pa.array(predictions == stored["labels"], mask=unlabelled | unpredicted),
        "split": _split_names(held_out_N[numbers]),
        "valid": stored["valid"],
        "fisher_norm": stored["frobenius_norms"],
        "fisher_rank": stored["ranks"],
        "kept_trace": pa.array(stored["kept_trace"], mask=np.isnan(stored["kept_trace"])),
        "loss": pa.array(stored["losses"].astype(np.float64), mask=np.isnan(stored["losses"])),
        "logits": pa.nulls(len(numbers)) if logits is None else logits,
        "image": pa.nulls(len(numbers)),
        "text": pa.nulls(len(numbers)),
    }
    own = {name: examples[name] for name in examples.column_names if name in ("image", "text") or name not in columns}
    return columns | own


def ensure_split(run: RunDirectory) -> None:
    """Write a table of examples for a factorization whose held-out examples are not those of the run's table.

    The run's table has the split of the factorization with which the Fishers were computed.
    """
    shared = run.shared_table("examples")
    if run.home == run.path:  # the former layout, with one factorization
        return
    stored_N = is_fit(read_table(shared, "examples", ["split"])["split"])
    config = run.config
    held_out_N = held_out(len(stored_N), config.factorization.held_out_fraction, config.seed)
    own = run.own_examples
    if np.array_equal(stored_N, ~held_out_N):
        own.unlink(missing_ok=True)
    elif not own.is_file() or not np.array_equal(is_fit(read_table(own, "examples", ["split"])["split"]), ~held_out_N):
        write_table_in_parts(own, "examples", with_split(shared, held_out_N), table_lineage(shared))


def with_split(path: Path, held_out_N: NDArray[np.bool_]) -> Iterator[pa.Table]:
    """Yield a table of examples in parts, with these held-out examples."""
    for start, table in _with_starts(read_table_in_parts(path, "examples")):
        split = _split_names(held_out_N[start : start + len(table)])
        yield table.set_column(table.column_names.index("split"), "split", split)


def _split_names(held_out_n: NDArray[np.bool_]) -> pa.Array:
    return pa.array(["fit", "held_out"], pa.string()).take(pa.array(held_out_n.astype(np.int8)))


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
