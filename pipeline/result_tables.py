"""The tables people query, made from what the stages computed; one function per stage that writes some."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.run_directory import RunDirectory
from pipeline.store import (
    SCHEMAS,
    Coefficients,
    FisherStore,
    columns_of,
    read_table,
    write_table,
    write_table_in_parts,
)
from pipeline.verification import top_examples


def held_out(n_examples: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which examples the components are not fitted on: a seeded random ``fraction`` of them, rounded down."""
    chosen = np.random.default_rng([seed, n_examples]).permutation(n_examples)[: int(fraction * n_examples)]
    mask = np.zeros(n_examples, dtype=bool)
    mask[chosen] = True
    return mask


_OF_EXAMPLES = ("labels", "valid", "frobenius_norms", "ranks", "kept_trace", "losses", "logits")
"""Arrays of the Fisher store that the table of examples is made of."""


def write_example_tables(run: RunDirectory, examples: pa.Table, class_names: Sequence[str]) -> None:
    """``examples`` and ``classes``, from the task's own table and the stored logits and norms."""
    store = FisherStore.open(run.fishers)
    n_examples = store.plan.n_examples
    stored = store.read_rows(np.arange(n_examples), [name for name in _OF_EXAMPLES if name in store.array_names])
    logits = stored.get("logits")
    predictions = np.zeros(n_examples, np.int64) if logits is None else logits.argmax(axis=1)
    unlabelled, unpredicted = stored["labels"] < 0, ~stored["valid"] | (logits is None)
    config = run.config
    split = held_out(n_examples, config.factorization.held_out_fraction, config.seed)
    columns: dict[str, Any] = {
        "example": np.arange(n_examples),
        "id": examples["id"],
        "label": pa.array(stored["labels"], mask=unlabelled),
        "prediction": pa.array(predictions, mask=unpredicted),
        "correct": pa.array(predictions == stored["labels"], mask=unlabelled | unpredicted),
        "split": np.where(split, "held_out", "fit").astype(object),
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
    write_table(run.table("examples"), "examples", columns | own)
    write_table(run.table("classes"), "classes", {"class": range(len(class_names)), "name": list(class_names)})


def write_parameter_table(run: RunDirectory, shapes: Mapping[str, Sequence[int]], left_out: Mapping[str, str]) -> None:
    """``parameters``: those that Fishers are taken of, with their shapes, and why the others are left out."""
    taken = [True] * len(shapes) + [False] * len(left_out)
    columns = {
        "parameter": [*shapes, *left_out],
        "shape": ["x".join(map(str, shape)) for shape in shapes.values()] + [None] * len(left_out),
        "size": [math.prod(shape) for shape in shapes.values()] + [None] * len(left_out),
        "taken": taken,
        "reason": [None] * len(shapes) + [*left_out.values()],
    }
    write_table(run.table("parameters"), "parameters", columns)


def write_component_tables(
    run: RunDirectory,
    components_KD: NDArray[np.float64],
    coefficients_NK: Coefficients,
    stability_K: NDArray[np.float64] | None = None,
) -> None:
    """``components``, ``top_examples`` and ``coefficients``; of the latter, one component at a time is held."""
    examples = read_table(run.table("examples"), "examples", ["split"])
    split_N = np.asarray(examples["split"].to_pylist())
    among = {split: split_N == split for split in ("fit", "held_out")}
    facts: list[dict[str, Any]] = []
    top: list[dict[str, Any]] = []

    def parts() -> Iterator[dict[str, Any]]:
        for component, w_N in enumerate(columns_of(coefficients_NK)):
            fitted_n = w_N[among["fit"]]
            facts.append(
                {"n_active": np.count_nonzero(fitted_n > 0), "mass": fitted_n.sum(), "energy": fitted_n @ fitted_n}
            )
            for split, among_N in among.items():
                chosen = top_examples(w_N, among_N, run.config.verification.top_examples)
                top.extend(
                    {"component": component, "split": split, "rank": rank, "example": example, "coefficient": w}
                    for rank, (example, w) in enumerate(zip(chosen.tolist(), w_N[chosen].tolist(), strict=True))
                )
            active = np.flatnonzero(w_N)
            active = active[np.argsort(-w_N[active], kind="stable")]
            yield {"example": active, "component": np.full(len(active), component), "coefficient": w_N[active]}

    write_table_in_parts(run.table("coefficients"), "coefficients", parts())
    write_table(run.table("top_examples"), "top_examples", rows_to_columns(top, "top_examples"))
    n_components = len(components_KD)
    cosines_KK = np.abs(components_KD @ components_KD.T)
    np.fill_diagonal(cosines_KK, -1)
    alone = n_components == 1
    write_table(
        run.table("components"),
        "components",
        {
            "component": np.arange(n_components),
            **{name: [each[name] for each in facts] for name in ("n_active", "mass", "energy")},
            "nearest_component": [None] if alone else cosines_KK.argmax(axis=1),
            "nearest_cosine": [None] if alone else cosines_KK.max(axis=1),
            "lift_cosine": [None] * n_components,
            "stability": [None] * n_components if stability_K is None else stability_K,
        },
    )


def rows_to_columns(rows: Sequence[dict[str, Any]], table: str) -> dict[str, list[Any]]:
    """Rows (dictionaries) of a table as columns, also where there are none."""
    return {name: [row[name] for row in rows] for name in SCHEMAS[table].names}
