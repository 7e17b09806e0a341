"""Summary of a run, and the table of components with their verification."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from npeff.query.tables import RunTables
from npeff.statistics.verdict import scoreboard, verdicts
from npeff.store.annotations import Annotations


def components_table(tables: RunTables) -> pa.Table:
    """Return the components table with names and notes, and the KL ratio and best control of the informative sign.

    The added columns are `name`, `note`, `detection` and `intruder` (after `npeff label --score`),
    `kl_ratio_matched_<examples>`, `best_control_<examples>` and `matched_<examples>`, or, for tables of earlier
    versions, `kl_ratio_<examples>_<plus|minus>` and `best_control_<examples>_<plus|minus>`.
    """
    table = tables.read("components")
    components, known = table["component"].to_pylist(), tables.annotations
    table = table.add_column(1, "name", pa.array(map(known.name, components), pa.string()))
    table = _with_verification(table, tables) if tables.has("verification") else table
    for name, values in _scores(tables).items():
        table = table.append_column(name, pa.array(map(values.get, components), pa.float64()))
    return table.append_column("note", pa.array(map(known.note, components), pa.string()))


def _scores(tables: RunTables) -> dict[str, dict[int, float | None]]:
    """Return the scores of `npeff label --score`. A score of a former name is null."""
    if not tables.has("label_scores"):
        return {}
    rows, known = tables.read("label_scores").to_pylist(), tables.annotations
    return {
        "detection": {
            row["component"]: row["detection"] for row in rows if row["name"] == known.name(row["component"])
        },
        "intruder": {row["component"]: row["intruder"] for row in rows},
    }


def _with_verification(table: pa.Table, tables: RunTables) -> pa.Table:
    rows = verdicts(tables.read("verification").to_pylist())
    for examples in sorted({v.examples for v in rows if v.informative}, key=lambda split: split == "fit"):
        found = {v.component: v for v in rows if v.informative and v.examples == examples}
        chosen = [found.get(component) for component in table["component"].to_pylist()]
        added = {
            f"kl_ratio_matched_{examples}": pa.array([v and v.kl_ratio for v in chosen], pa.float64()),
            f"best_control_{examples}": pa.array([v and v.best_control for v in chosen], pa.float64()),
            f"matched_{examples}": pa.array([v and v.matched for v in chosen], pa.bool_()),
        }
        for name, column in added.items():
            table = table.append_column(name, column)
    former = {(v.examples, v.sign) for v in rows if v.informative is None}
    for examples, sign in sorted(former, key=lambda key: (key[0] == "fit", -key[1])):
        found = {v.component: v for v in rows if (v.examples, v.sign) == (examples, sign)}
        chosen = [found.get(component) for component in table["component"].to_pylist()]
        suffix = f"{examples}_{'plus' if sign > 0 else 'minus'}"
        ratios = pa.array([v and v.kl_ratio for v in chosen], pa.float64())
        controls = pa.array([v and v.best_control for v in chosen], pa.float64())
        table = table.append_column(f"kl_ratio_{suffix}", ratios)
        table = table.append_column(f"best_control_{suffix}", controls)
    return table


def with_names(table: pa.Table, known: Annotations) -> pa.Table:
    """Return a table with the column `name` after `component`, if any component of the factorization has a name."""
    if not any(each.name for each in known.of_component.values()):
        return table
    names = pa.array(map(known.name, table["component"].to_pylist()), pa.string())
    return table.add_column(1 + table.column_names.index("component"), "name", names)


def summary(tables: RunTables) -> dict[str, Any]:
    """Return a summary of the run for JSON: counts, explained variance, accuracy, KL ratios, existing tables."""
    found: dict[str, Any] = {
        "run_dir": str(tables.run_dir),
        "factorization": tables.run.name,
        "tables": tables.names(),
    }
    if tables.has("examples"):
        columns = tables.read("examples", ["split", "valid", "correct"])
        valid = columns["valid"].to_numpy().astype(bool)
        found["n_examples"] = len(columns)
        found["n_invalid"] = int((~valid).sum())
        for split in ("fit", "held_out"):
            chosen = columns.filter(pc.and_(columns["valid"], pc.equal(columns["split"], split)))
            found[f"n_{split}"] = len(chosen)
            found[f"accuracy_{split}"] = pc.mean(chosen["correct"]).as_py()
    if tables.has("components"):
        active = tables.read("components", ["n_active"])["n_active"].to_numpy()
        found["n_components"] = len(active)
        found["n_dead_components"] = int((active == 0).sum())
    factorize = tables.record("factorize")
    found |= {key: factorize[key] for key in ("explained", "explained_held_out", "stopped") if key in factorize}
    if tables.has("verification"):
        found["verification"] = [
            scores.to_json() for scores in scoreboard(verdicts(tables.read("verification").to_pylist()))
        ]
    return found
