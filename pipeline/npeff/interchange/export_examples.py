"""Export of the examples of components, for a language model or a person that names the components.

One line of JSON for each component:

    {"component": 3, "name": null, "note": null, "n_active": 61,
     "top": [{"example": 17, "id": "a", "split": "held_out", "coefficient": 0.9, "text": "...", "label": "yes",
              "prediction": "no", "correct": false, "tokens": [{"token": "not", "share": 0.4}, ...], ...}, ...],
     "contrast": [...]}

`label` and `prediction` are names of classes, or their numbers. ``tokens`` is there if the stage ``attribute`` is
complete. The other keys of an example are the columns of the task. Images are left out.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from npeff.query.components import ComponentStore
from npeff.reports.contrast import classes_of, contrast_examples
from npeff.storage.atomic import write_file_atomically
from npeff.storage.location import location

_COLUMNS = ("id", "split", "text", "label", "prediction", "correct")
"""Columns of the table of examples that are exported, besides those of the task."""


def export_examples(
    run_dir: str | Path, file: str | Path, *, n_examples: int = 20, factorization: str | None = None
) -> int:
    """Write the top examples and the contrast examples of every component to a file of JSON lines.

    Args:
        run_dir: The run directory.
        file: The file to write.
        n_examples: Largest number of top examples of each split, and of contrast examples, of a component.
        factorization: Name of the factorization. The default is ``default``, or the only one.

    Returns:
        The number of lines.

    Raises:
        QueryError: The path is not a run directory, or there are no components yet, or a table is damaged.
        StoreError: The file cannot be written.
    """
    store = ComponentStore.open(run_dir, factorization)
    lines = [json.dumps(each, default=str) for each in examples_of_components(store, n_examples)]
    write_file_atomically(location(file), lambda stream: stream.write(("\n".join(lines) + "\n").encode()))
    return len(lines)


def examples_of_components(store: ComponentStore, n_examples: int) -> list[dict[str, Any]]:
    """Return the objects that `export_examples` writes, in the order of the components."""
    components = store.components_table().select(["component", "name", "note", "n_active"]).to_pylist()
    listed = defaultdict[int, list[dict[str, Any]]](list)
    order = [("component", "ascending"), ("split", "descending"), ("rank", "ascending")]  # held-out examples first
    for row in store.table("top_examples").sort_by(order).to_pylist():
        listed[row["component"]].append(row)
    members = {component: [row["example"] for row in rows] for component, rows in listed.items()}
    contrasts = contrast_examples(store.stored_coefficients, members, classes_of(store.tables), n_examples)
    shown = {
        component: [row for row in rows if row["rank"] < n_examples and row["coefficient"] > 0]
        for component, rows in listed.items()
    }
    wanted = {row["example"] for rows in shown.values() for row in rows}
    wanted |= {each.example for found in contrasts.values() for each in found}
    described, tokens = _described(store, wanted), _tokens(store)
    result = []
    for row in components:
        component = row["component"]
        top = [
            _example(described, each["example"], each["coefficient"], tokens.get((component, each["example"])))
            for each in shown.get(component, [])
        ]
        contrast = [_example(described, each.example, each.coefficient) for each in contrasts.get(component, [])]
        result.append({**row, "top": top, "contrast": contrast})
    return result


def _example(
    described: Mapping[int, Mapping[str, Any]],
    example: int,
    coefficient: float,
    tokens: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    found: dict[str, Any] = {"example": example, "coefficient": coefficient, **described[example]}
    return found if tokens is None else found | {"tokens": tokens}


def _described(store: ComponentStore, examples: set[int]) -> dict[int, dict[str, Any]]:
    """Return the columns of examples, with the names of classes, by example."""
    columns = ["example", *_COLUMNS, *store.metadata_columns()]
    rows = store.tables.read("examples", columns, pc.field("example").isin(sorted(examples))).to_pylist()
    names = store.class_names()
    for row in rows:
        for column in ("label", "prediction"):
            row[column] = names.get(row[column], row[column])
    return {row.pop("example"): row for row in rows}


def _tokens(store: ComponentStore) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Return the shares of the tokens of examples, by component and example. Positions of images have no tokens."""
    found = defaultdict[tuple[int, int], list[dict[str, Any]]](list)
    if store.tables.has("position_shares"):
        for row in store.table("position_shares").to_pylist():
            if row["token"] is not None:
                found[row["component"], row["example"]].append({"token": row["token"], "share": row["share"]})
    return found
