"""The component store: what a finished factorization says about examples and components, for reading only.

N examples, K components, D sketch dimension, P parameters. Arrays are lazy dask arrays over the stored Zarr chunks;
tables are Arrow tables over the stored Parquet files (`.to_pandas()` makes them data frames, where pandas is there);
nothing is loaded before it is asked for, and nothing is written. Answers about some examples or components read the few
groups of rows that hold them, so the tables may be far larger than the memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.query import neighbours
from npeff.query.coefficients import n_larger, runs_of
from npeff.query.errors import QueryError
from npeff.query.summary import components_table, summary
from npeff.query.tables import EXAMPLE_COLUMNS, NAMED_CLASSES, RunTables, missing
from npeff.storage.atomic import is_committed
from npeff.storage.errors import StoreError
from npeff.storage.location import location

if TYPE_CHECKING:  # most answers need none of Zarr, Dask, SciPy and DuckDB, which are imported where they are used
    import dask.array as da
    import zarr

    from npeff.store.component_store import StoredFactorization

_TOO_WIDE_TO_LIST = ("image", "logits", "valid")
"""Columns of the examples table that a list of examples leaves out."""

_INT64_DIGITS = 19
_MASKS_KEPT = 8
"""Conditions on examples whose answers (a byte per example) are kept."""


class ComponentStore:
    """Questions to one run: `ComponentStore.open("runs/digits").top_examples(17)`.

    Every method raises `QueryError` with one clear line when the run cannot answer (yet).
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.tables = RunTables(run_dir)
        self._masks: dict[str, NDArray[np.bool_]] = {}

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
        from npeff.store.direction_store import DirectionStore

        try:
            arrays = DirectionStore.open(path).arrays
        except StoreError as error:
            raise QueryError.of(error) from error
        return {name: _as_dask(array) for name, array in arrays.items()}

    @cached_property
    def cosines(self) -> np.ndarray:
        """Cosines of all pairs of components in the sketch (K, K) float64; 0 for a component that is all zeros."""
        return self._unit_components @ self._unit_components.T

    def table(self, name: str) -> pa.Table:
        """One whole table, such as 'examples', 'coefficients' or 'verification'."""
        return self.tables.read(name)

    def components_table(self) -> pa.Table:
        """One row per component: the components table, with KL ratio and best control of every verified row beside it.

        The columns are `kl_ratio_<examples>_<plus|minus>` and `best_control_<examples>_<plus|minus>`.
        """
        return components_table(self.tables)

    def examples_where(self, where: str | None = None, split: str | None = None) -> NDArray[np.bool_]:
        """Which examples (N,) a condition in SQL holds for, such as "label = 2 and not correct", and are of a split.

        Over the columns of the examples table, `label_name` and `prediction_name`; see `npeff.query.filters`.

        Raises:
            QueryError: it is no condition, or names a column that is not there.
        """
        if split not in (None, "fit", "held_out"):
            raise QueryError(f"there is no split '{split}': choose fit or held_out")
        chosen = [f"split = '{split}'"] if split else []
        masks = [self._mask(condition) for condition in ([where] if where is not None else []) + chosen]
        return np.logical_and.reduce(masks) if masks else np.ones(self._n_examples, dtype=bool)

    def top_examples(self, component: int, n: int = 20, split: str | None = None, where: str | None = None) -> pa.Table:
        """The `n` examples with the largest coefficients on a component: of all, of one split, of those that meet a
        condition (see `examples_where`).

        Columns: rank (among these), coefficient, the examples table's columns (without image and logits), label_name
        and prediction_name where the task has names for its classes.
        """
        self._check_component(component)
        _check_number(n, "examples")
        among_N = self.examples_where(where, split) if split or where is not None else None
        examples: list[int] = []
        coefficients: list[float] = []
        for run in runs_of(self.tables, component):
            chosen = slice(None) if among_N is None else among_N[run.examples]
            examples += run.examples[chosen][: n - len(examples)].tolist()
            coefficients += run.coefficients[chosen][: n - len(coefficients)].tolist()
            if len(examples) == n:
                break
        described = self.describe_examples(examples).add_column(0, "coefficient", pa.array(coefficients, pa.float64()))
        return described.add_column(0, "rank", pa.array(range(len(examples)), pa.int64()))

    def example(self, example: int | str) -> pa.Table:
        """The components of one example, given by row number or id, largest coefficient first.

        Columns: component, coefficient, share (of this example's coefficients), rank (0-based, among all examples of
        that component). A string is looked up among the ids before it is read as a row number.
        """
        weights_K = self._weights(self._example_index(example))
        components = np.flatnonzero(weights_K)
        components = components[np.argsort(-weights_K[components], kind="stable")]
        values = weights_K[components]
        return pa.table(
            {
                "component": components,
                "coefficient": values,
                "share": values / values.sum() if len(values) else values,
                "rank": pa.array(n_larger(self.tables, components.tolist(), values.tolist()), pa.int64()),
            }
        )

    def neighbours(
        self, example: int | str, n: int = 20, split: str | None = None, where: str | None = None
    ) -> pa.Table:
        """The `n` examples nearest to one by the cosine of their coefficients, which are examples the model treats
        alike; of one split, of those that meet a condition.

        Columns: rank, cosine, shared_components (that both have), then as in `top_examples`. Examples that share no
        component with it are left out, and so is the example itself.
        """
        _check_number(n, "examples")
        index = self._example_index(example)
        stored = self._factorization.coefficient_norms
        if stored is None:
            norms_N = neighbours.norms(self.tables, self._n_examples)
        else:
            norms_N = self._stored("coefficient_norms", stored, slice(None))
        cosines_N, shared_N = neighbours.cosines(self.tables, self._weights(index), norms_N)
        candidates = self.examples_where(where, split) & (shared_N > 0)
        candidates[index] = False
        found = np.flatnonzero(candidates)
        found = found[np.argsort(-cosines_N[found], kind="stable")[:n]]
        described = self.describe_examples(found.tolist())
        described = described.add_column(0, "shared_components", pa.array(shared_N[found], pa.int64()))
        described = described.add_column(0, "cosine", pa.array(cosines_N[found], pa.float64()))
        return described.add_column(0, "rank", pa.array(range(len(found)), pa.int64()))

    def similar_components(self, component: int, n: int = 10) -> pa.Table:
        """The `n` components nearest to one by |cos| in the sketch (a direction's sign means nothing).

        Columns: component, cosine, abs_cosine, shared_top_examples (how many of the listed top examples both have).
        """
        self._check_component(component)
        found = _nearest(self.cosines[component], n, without=component)
        top = self._top_sets
        shared = [len(top.get(component, set()) & top.get(j, set())) for j in found["component"].to_pylist()]
        return found.append_column("shared_top_examples", pa.array(shared, pa.int64()))

    def similar_components_in(self, other: ComponentStore, component: int, n: int = 10) -> pa.Table:
        """The `n` components of another run that are nearest to one of this run, by |cos| in the sketch.

        Columns: component (of the other run), cosine, abs_cosine.

        Raises:
            QueryError: the runs differ in model, parameters, sketch or seed, or have components of diagonals.
        """
        from npeff.store.same_space import differences_in_space

        self._check_component(component)
        for store in (self, other):
            if (kind := store.tables.json("stages", "factorize.json").get("factorized", "fishers")) != "fishers":
                raise QueryError(f"the components of {store.run_dir} are of kind {kind}: only those of fishers compare")
        if different := differences_in_space(self._fisher_attributes, other._fisher_attributes):
            raise QueryError(
                f"the components of {other.run_dir} and {self.run_dir} do not compare: the runs differ in "
                f"{', '.join(different)}"
            )
        return _nearest(other._unit_components @ self._unit_components[component], n)

    def enriched(self, where: str, split: str | None = None, top: int | None = None, n: int | None = None) -> pa.Table:
        """Components that the examples which meet a condition have more often than the other valid ones.

        An example has a component if its coefficient is above 0, or is among the `top` largest. One row per component
        (the first `n`), by p-value: component, n_in_subset and n_outside (examples that have it), share_in_subset and
        share_outside (of the examples there), odds_ratio, p_value (Fisher's exact test, one-sided), q_value
        (Benjamini-Hochberg over all components), mean_in_subset and mean_outside (mean coefficient, zeros counted). The
        tests and what they assume are in `npeff.query.enrichment`.

        Raises:
            QueryError: the condition is wrong, or holds for none or for all of the examples.
        """
        from npeff.query.enrichment import enriched

        for wanted, what in ((top, "top examples"), (n, "components")):
            if wanted is not None:
                _check_number(wanted, what)
        among_N = self.examples_where("valid", split)
        subset_N = self.examples_where(where) & among_N
        n_subset, n_all = int(subset_N.sum()), int(among_N.sum())
        if n_subset in (0, n_all):
            which = "none" if n_subset == 0 else "all"
            raise QueryError(
                f"the condition holds for {which} of the {n_all} valid examples: there is nothing to compare"
            )
        return enriched(self.tables, self._n_components, subset_N, among_N, top).slice(0, n)

    def layer_energy(self, component: int, by: str = "parameter") -> pa.Table:
        """Where in the model a component's direction is: its share of squared norm in each parameter, largest first.

        Columns: parameter (or layer, with `by="layer"`: the parameters of one module, such as weight and bias, summed),
        energy; the energies sum to 1.

        Raises:
            QueryError: the component is not lifted.
        """
        self._check_component(component)
        if by not in ("parameter", "layer"):
            raise QueryError(f"energy is not known by '{by}': choose parameter or layer")
        rows = self.tables.read("layer_energy", ["parameter", "energy"], pc.field("component") == component)
        if not len(rows):
            raise QueryError(
                f"component {component} is not lifted: run `npeff lift {self.run_dir} -c {component}` first"
            )
        if by == "layer":
            layers = pc.replace_substring_regex(rows["parameter"], r"\.[^.]*$", "")
            rows = (
                pa.table({"layer": layers, "energy": rows["energy"]}).group_by("layer").aggregate([("energy", "sum")])
            )
            rows = rows.rename_columns({"energy_sum": "energy"})
        return rows.sort_by([("energy", "descending"), (by, "ascending")])

    def verification(self, component: int) -> pa.Table:
        """The rows of a component in the table of verified directions; none where it was not verified."""
        self._check_component(component)
        return self.tables.read("verification", None, pc.field("component") == component)

    def sql(self, query: str) -> pa.Table:
        """Answer one SELECT over all tables of the run (DuckDB's dialect); it can read nothing else."""
        from npeff.query.sql import run_sql

        return run_sql(self.tables, query)

    def summary(self) -> dict[str, Any]:
        """The run in numbers, ready for JSON: counts, explained variance, accuracy, KL ratios, what is there."""
        return summary(self.tables)

    def describe_examples(self, examples: list[int]) -> pa.Table:
        """Rows of the examples table in the given order, without image and logits, with the names of classes."""
        columns = [name for name in self.tables.columns("examples") if name not in _TOO_WIDE_TO_LIST]
        wanted = pa.array(examples, pa.int64())
        rows = self.tables.read_groups("examples", self.tables.groups_with("examples", "example", examples), columns)
        rows = rows.take(pc.index_in(wanted, value_set=rows["example"].combine_chunks()))
        names = self.class_names()
        for name, column in NAMED_CLASSES.items():
            if names and column in columns:
                named = [None if c is None else names.get(c, str(c)) for c in rows[column].to_pylist()]
                position = rows.column_names.index(column) + 1
                rows = rows.add_column(position, name, pa.array(named, pa.string()))
        return rows

    def class_names(self) -> dict[int, str]:
        """Class number to name; empty where the task gives its classes no names."""
        return self._class_names

    @cached_property
    def _class_names(self) -> dict[int, str]:
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

    @property
    def _n_components(self) -> int:
        return self.tables.n_rows("components")

    @property
    def _n_examples(self) -> int:
        return self.tables.n_rows("examples")

    def _check_component(self, component: int) -> None:
        if not 0 <= component < self._n_components:
            raise QueryError(
                f"there is no component {component}: this run has components 0 to {self._n_components - 1}"
            )

    def _mask(self, condition: str) -> NDArray[np.bool_]:
        if condition not in self._masks:
            while len(self._masks) >= _MASKS_KEPT:
                del self._masks[next(iter(self._masks))]
            from npeff.query.filters import matching

            self._masks[condition] = matching(self.tables, condition)
        return self._masks[condition]

    def _weights(self, index: int) -> NDArray[np.float64]:
        """The coefficients (K,) of a valid example."""
        row = self._stored("coefficients", self._factorization.coefficients, index)
        if np.isnan(row).any():  # as a chunk that is gone is read
            raise self._corrupt("coefficients")
        return row.astype(np.float64)

    @cached_property
    def _unit_components(self) -> NDArray[np.float64]:
        """(K, D); zeros where a component is all zeros."""
        rows = self._stored("components", self._factorization.components, slice(None)).astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)

    def _stored(self, name: str, array: zarr.Array, rows: int | slice) -> NDArray[Any]:
        try:
            return np.asarray(array[rows])
        except (ValueError, OSError) as error:  # a chunk's checksum does not match, or the chunk is gone
            raise self._corrupt(name) from error

    def _corrupt(self, name: str) -> QueryError:
        path = self.run_dir / "factorization.zarr"
        remedy = f"delete it and run `npeff factorize {self.run_dir}` again"
        return QueryError(f"{name} of {path} are corrupt", remedy, path=path / name)

    @property
    def _fisher_attributes(self) -> dict[str, Any]:
        from npeff.store.fisher_store import FisherStore

        try:
            return FisherStore.open(self.run_dir / "fishers.zarr").attrs
        except StoreError as error:
            raise QueryError.of(error) from error

    def _example_index(self, example: int | str) -> int:
        rows = self._examples_called("id", example) if isinstance(example, str) else []
        if not rows and isinstance(example, int):
            rows = self._examples_called("example", example)
        if not rows and isinstance(example, str) and example.isdecimal() and len(example) < _INT64_DIGITS:
            rows = self._examples_called("example", int(example))
        if not rows:
            raise QueryError(
                f"there is no example {json.dumps(example)}: give an id or a row number below {self._n_examples}"
            )
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

    def _examples_called(self, column: str, value: int | str) -> list[dict[str, Any]]:
        groups = self.tables.groups_with("examples", column, [value])
        columns = ["example", "valid", column]
        return (
            self.tables.read_groups("examples", groups, dict.fromkeys(columns))
            .filter(pc.field(column) == value)
            .to_pylist()
        )

    @cached_property
    def _factorization(self) -> StoredFactorization:
        path = self.run_dir / "factorization.zarr"
        if not is_committed(path):
            raise missing(self.run_dir, "factorization.zarr", "factorize")
        from npeff.store.component_store import open_factorization

        try:
            return open_factorization(path)
        except StoreError as error:
            raise QueryError.of(error) from error


def _as_dask(array: zarr.Array) -> da.Array:
    """A lazy view with one block per stored shard, or per chunk where the array is not sharded."""
    import dask.array as da

    return da.from_array(array, chunks=array.shards or array.chunks)


def _nearest(cosines_K: NDArray[np.float64], n: int, without: int | None = None) -> pa.Table:
    """The `n` components with the largest |cos|: component, cosine, abs_cosine."""
    _check_number(n, "components")
    order = [j for j in np.argsort(-np.abs(cosines_K), kind="stable").tolist() if j != without][:n]
    return pa.table(
        {
            "component": pa.array(order, pa.int64()),
            "cosine": pa.array(cosines_K[order], pa.float64()),
            "abs_cosine": pa.array(np.abs(cosines_K[order]), pa.float64()),
        }
    )


def _check_number(n: int, of_what: str) -> None:
    if n < 1:
        raise QueryError(f"asked for {n} {of_what}: ask for at least 1")
