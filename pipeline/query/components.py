"""The component store: what a finished factorization says about examples and components, for reading only.

N examples, K components, D sketch dimension, P parameters. Arrays are lazy dask arrays over the stored Zarr chunks;
tables are Arrow tables over the stored Parquet files; nothing is loaded before it is asked for, and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import zarr

from pipeline.query.errors import QueryError
from pipeline.query.sql import run_sql
from pipeline.query.tables import EXAMPLE_COLUMNS, RunTables, missing
from pipeline.query.verdict import scoreboard, verdicts
from pipeline.store import (
    DirectionStore,
    StoredFactorization,
    StoreError,
    is_committed,
    location,
    open_factorization,
)

_TOO_WIDE_TO_LIST = ("image", "logits", "valid")
"""Columns of the examples table that a list of examples leaves out."""


_INT64_DIGITS = 19


class ComponentStore:
    """Questions to one run: `ComponentStore.open("runs/digits").top_examples(17)`.

    Every method raises `QueryError` with one clear line when the run cannot answer (yet).
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.tables = RunTables(run_dir)

    @classmethod
    def open(cls, run_dir: str | Path) -> ComponentStore:
        """Open a run directory at whatever stage it is.

        Raises:
            QueryError: the folder does not exist or is not a run directory.
        """
        path = location(run_dir)
        if not path.is_dir():
            wrong = "is a file" if path.exists() else "does not exist"
            raise QueryError(f"{path} {wrong}: give the run directory of an `npeff run`")
        if not any((path / name).exists() for name in ("run.yaml", "tables", "factorization.zarr")):
            raise QueryError(f"{path} is not a run directory: it has no run.yaml")
        return cls(path)

    @cached_property
    def coefficients(self) -> da.Array:
        """W, non-negative (N, K); rows of invalid examples are NaN."""
        return _as_dask(self._factorization.coefficients)

    @cached_property
    def components(self) -> da.Array:
        """H, unit rows in the sketch (K, D)."""
        return _as_dask(self._factorization.components)

    @cached_property
    def directions(self) -> Mapping[str, da.Array]:
        """Parameter name to (K, *shape): each component as a unit direction in parameter space."""
        path = self.run_dir / "directions.zarr"
        if not is_committed(path):
            raise missing(self.run_dir, "directions.zarr", "lift")
        try:
            arrays = DirectionStore.open(path).arrays
        except StoreError as error:
            raise QueryError(str(error)) from error
        return {name: _as_dask(array) for name, array in arrays.items()}

    @cached_property
    def cosines(self) -> np.ndarray:
        """Cosines of all pairs of components in the sketch (K, K) float64; 0 for a component that is all zeros."""
        components = self.components.astype("float64")
        try:
            products = (components @ components.T).compute()
        except (ValueError, OSError) as error:  # a chunk's checksum does not match, or the chunk is gone
            path = self.run_dir / "factorization.zarr"
            raise QueryError(
                f"components of {path} are corrupt: delete it and run `npeff factorize {self.run_dir}` again"
            ) from error
        norms = np.sqrt(np.diag(products))
        return np.divide(
            products, np.outer(norms, norms), out=np.zeros_like(products), where=np.outer(norms, norms) > 0
        )

    def table(self, name: str) -> pa.Table:
        """One whole table, such as 'examples', 'coefficients' or 'verification'."""
        return self.tables.read(name)

    def components_table(self) -> pa.Table:
        """One row per component: the components table, with KL ratio and best control of every verified row beside it.

        The columns are `kl_ratio_<examples>_<plus|minus>` and `best_control_<examples>_<plus|minus>`.
        """
        table = self.table("components")
        if not self.tables.has("verification"):
            return table
        rows = verdicts(self.table("verification").to_pylist())
        for examples, sign in sorted({(v.examples, v.sign) for v in rows}, key=lambda key: (key[0] == "fit", -key[1])):
            found = {v.component: v for v in rows if (v.examples, v.sign) == (examples, sign)}
            chosen = [found.get(component) for component in table["component"].to_pylist()]
            suffix = f"{examples}_{'plus' if sign > 0 else 'minus'}"
            ratios = pa.array([v and v.kl_ratio for v in chosen], pa.float64())
            controls = pa.array([v and v.best_control for v in chosen], pa.float64())
            table = table.append_column(f"kl_ratio_{suffix}", ratios)
            table = table.append_column(f"best_control_{suffix}", controls)
        return table

    def top_examples(self, component: int, n: int = 20, split: str | None = None) -> pa.Table:
        """The `n` examples with the largest coefficients on a component, of one split or of both.

        Columns: rank, coefficient, the examples table's columns (without image and logits), label_name and
        prediction_name where the task has names for its classes.
        """
        self._check_component(component)
        if n < 1:
            raise QueryError(f"asked for {n} examples: ask for at least 1")
        if split not in (None, "fit", "held_out"):
            raise QueryError(f"there is no split '{split}': choose fit or held_out")
        rows = self.tables.read("coefficients", ["example", "coefficient"], pc.field("component") == component)
        if split is not None:
            members = self.tables.read("examples", ["example"], pc.field("split") == split)["example"]
            rows = rows.filter(pc.is_in(rows["example"], value_set=members.combine_chunks()))
        rows = rows.sort_by([("coefficient", "descending"), ("example", "ascending")]).slice(0, min(n, len(rows)))
        described = self.describe_examples(rows["example"].to_pylist())
        ranked = described.add_column(0, "coefficient", rows["coefficient"])
        return ranked.add_column(0, "rank", pa.array(range(len(rows)), pa.int64()))

    def example(self, example: int | str) -> pa.Table:
        """The components of one example, given by row number or id, largest coefficient first.

        Columns: component, coefficient, share (of this example's coefficients), rank (0-based, among all examples of
        that component). A string is looked up among the ids before it is read as a row number.
        """
        index = self._example_index(example)
        found = self.tables.read("coefficients", ["component", "coefficient"], pc.field("example") == index)
        found = found.sort_by([("coefficient", "descending"), ("component", "ascending")])
        values = found["coefficient"].to_numpy()
        ranks = []
        for component, value in zip(found["component"].to_pylist(), values.tolist(), strict=True):
            larger = (pc.field("component") == component) & (pc.field("coefficient") > value)
            ranks.append(self.tables.dataset("coefficients").count_rows(filter=larger))
        found = found.append_column("share", pa.array(values / values.sum() if len(values) else [], pa.float64()))
        return found.append_column("rank", pa.array(ranks, pa.int64()))

    def similar_components(self, component: int, n: int = 10) -> pa.Table:
        """The `n` components nearest to one by |cos| in the sketch (a direction's sign means nothing).

        Columns: component, cosine, abs_cosine, shared_top_examples (how many of the listed top examples both have).
        """
        self._check_component(component)
        if n < 1:
            raise QueryError(f"asked for {n} components: ask for at least 1")
        cosines = self.cosines[component]
        order = [j for j in np.argsort(-np.abs(cosines), kind="stable").tolist() if j != component][:n]
        top = self._top_sets
        shared = [len(top.get(component, set()) & top.get(j, set())) for j in order]
        return pa.table(
            {
                "component": pa.array(order, pa.int64()),
                "cosine": pa.array(cosines[order], pa.float64()),
                "abs_cosine": pa.array(np.abs(cosines[order]), pa.float64()),
                "shared_top_examples": pa.array(shared, pa.int64()),
            }
        )

    def sql(self, query: str) -> pa.Table:
        """Answer one SELECT over all tables of the run (DuckDB's dialect); it can read nothing else."""
        return run_sql(self.tables, query)

    def summary(self) -> dict[str, Any]:
        """The run in numbers, ready for JSON: counts, explained variance, accuracy, KL ratios, what is there."""
        found: dict[str, Any] = {"run_dir": str(self.run_dir), "tables": self.tables.names()}
        if self.tables.has("examples"):
            columns = self.tables.read("examples", ["split", "valid", "correct"])
            splits = np.asarray(columns["split"].to_pylist(), dtype=object)
            valid = columns["valid"].to_numpy().astype(bool)
            found["n_examples"] = len(columns)
            found["n_invalid"] = int((~valid).sum())
            for split in ("fit", "held_out"):
                chosen = columns.filter(pa.array((splits == split) & valid))
                found[f"n_{split}"] = len(chosen)
                found[f"accuracy_{split}"] = pc.mean(chosen["correct"]).as_py()
        if self.tables.has("components"):
            active = self.tables.read("components", ["n_active"])["n_active"].to_numpy()
            found["n_components"] = len(active)
            found["n_dead_components"] = int((active == 0).sum())
        factorize = self.tables.json("stages", "factorize.json")
        found |= {key: factorize[key] for key in ("explained", "explained_held_out", "stopped") if key in factorize}
        if self.tables.has("verification"):
            found["verification"] = [
                vars(scores) for scores in scoreboard(verdicts(self.table("verification").to_pylist()))
            ]
        return found

    def describe_examples(self, examples: list[int]) -> pa.Table:
        """Rows of the examples table in the given order, without image and logits, with the names of classes."""
        columns = [name for name in self.tables.columns("examples") if name not in _TOO_WIDE_TO_LIST]
        wanted = pa.array(examples, pa.int64())
        rows = self.tables.read("examples", columns, pc.field("example").isin(wanted))
        rows = rows.take(pc.index_in(wanted, value_set=rows["example"].combine_chunks()))
        names = self.class_names()
        for column in ("label", "prediction"):
            if names and column in columns:
                named = [None if c is None else names.get(c, str(c)) for c in rows[column].to_pylist()]
                position = rows.column_names.index(column) + 1
                rows = rows.add_column(position, f"{column}_name", pa.array(named, pa.string()))
        return rows

    def class_names(self) -> dict[int, str]:
        """Class number to name; empty where the task gives its classes no names."""
        if not self.tables.has("classes"):
            return {}
        rows = self.tables.read("classes", ["class", "name"]).to_pylist()
        return {row["class"]: row["name"] for row in rows}

    def metadata_columns(self) -> list[str]:
        """Columns of the examples table that the task added."""
        return [name for name in self.tables.columns("examples") if name not in EXAMPLE_COLUMNS]

    @cached_property
    def _top_sets(self) -> dict[int, set[int]]:
        rows = self.tables.read("top_examples", ["component", "example"])
        sets: dict[int, set[int]] = {}
        for component, example in zip(rows["component"].to_pylist(), rows["example"].to_pylist(), strict=True):
            sets.setdefault(component, set()).add(example)
        return sets

    def _check_component(self, component: int) -> None:
        count = self.tables.dataset("components").count_rows()
        if not 0 <= component < count:
            raise QueryError(f"there is no component {component}: this run has components 0 to {count - 1}")

    def _example_index(self, example: int | str) -> int:
        where = pc.field("id") == example if isinstance(example, str) else pc.field("example") == example
        rows = self.tables.read("examples", ["example", "valid"], where).to_pylist()
        if not rows and isinstance(example, str) and example.isdecimal() and len(example) < _INT64_DIGITS:
            rows = self.tables.read("examples", ["example", "valid"], pc.field("example") == int(example)).to_pylist()
        if not rows:
            count = self.tables.dataset("examples").count_rows()
            raise QueryError(f"there is no example {json.dumps(example)}: give an id or a row number below {count}")
        if len(rows) > 1:
            shown = ", ".join(str(row["example"]) for row in rows[:5])
            raise QueryError(
                f"{len(rows)} examples have the id {json.dumps(example)}: ask by row number ({shown}, ...)"
            )
        if not rows[0]["valid"]:
            raise QueryError(
                f"example {json.dumps(example)} has no coefficients: its logits or gradients were not finite"
            )
        return int(rows[0]["example"])

    @cached_property
    def _factorization(self) -> StoredFactorization:
        path = self.run_dir / "factorization.zarr"
        if not is_committed(path):
            raise missing(self.run_dir, "factorization.zarr", "factorize")
        try:
            return open_factorization(path)
        except StoreError as error:
            raise QueryError(str(error)) from error


def _as_dask(array: zarr.Array) -> da.Array:
    """A lazy view with one block per stored shard, or per chunk where the array is not sharded."""
    return da.from_array(array, chunks=array.shards or array.chunks)
