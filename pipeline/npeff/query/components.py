"""The component store: read-only queries of the examples and components of a run.

N examples, K components, D sketch dimension, P parameters. Arrays are lazy dask arrays over the stored Zarr chunks.
Tables are Arrow tables over the stored Parquet files; `.to_pandas()` converts them to data frames if pandas is
installed. Data are loaded on demand, and nothing is written. A query for some examples or components reads only the row
groups with these examples or components, so the tables may be much larger than the memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.query import neighbours
from npeff.query.coefficients import Run, all_runs, n_larger, runs_of
from npeff.query.errors import QueryError
from npeff.query.evidence import (
    By,
    check_by,
    computed_evidence,
    direction_evidence,
    evidence_runs,
    refuse_diagonals,
    stored_evidence,
)
from npeff.query.paths import paths_of
from npeff.query.summary import components_table, summary, with_names
from npeff.query.tables import EXAMPLE_COLUMNS, NAMED_CLASSES, RunTables, StoredRun, missing
from npeff.storage.atomic import is_committed
from npeff.storage.errors import StoreError
from npeff.storage.location import location
from npeff.store.run_files import FilesOfRun, chosen_factorization, refuse_unfinished_migration, run_and_name
from npeff.views import html_of

if TYPE_CHECKING:  # most queries need none of Zarr, Dask, SciPy and DuckDB, which are imported on use
    import dask.array as da
    import zarr

    from npeff.query.component import Component
    from npeff.store.annotations import Annotations
    from npeff.store.component_store import StoredFactorization
    from npeff.store.direction_store import DirectionStore

_TOO_WIDE_TO_LIST = ("image", "logits", "valid")
"""Columns of the examples table that lists of examples do not show."""

_INT64_DIGITS = 19
_MASKS_KEPT = 8
"""Number of conditions on examples whose masks (one byte per example) are cached."""


class ComponentStore:
    """Queries of one run.

    Every method raises `QueryError` if the query is not valid, or if the stage that it needs has not run yet.

    Attributes:
        run_dir: The run directory.
        run: The files of the run and of its factorization.
        tables: The tables of the run and of its factorization.

    Examples:
        A run with 360 examples and 12 components in a sketch of 64 dimensions:

        >>> from npeff import ComponentStore
        >>> store = ComponentStore.open("runs/digits")
        >>> store.coefficients.shape, store.components.shape
        ((360, 12), (12, 64))
        >>> top = store.top_examples(3, n=5, split="held_out")
        >>> top.column_names[:4]
        ['rank', 'coefficient', 'example', 'id']
        >>> top["rank"].to_pylist()
        [0, 1, 2, 3, 4]
        >>> store.example(0).column_names
        ['component', 'coefficient', 'share', 'rank']
        >>> store.sql("SELECT count(*) AS n FROM examples WHERE split = 'held_out'").to_pylist()
        [{'n': 120}]
        >>> store.top_examples(99)
        Traceback (most recent call last):
        npeff.query.errors.QueryError: there is no component 99: this run has components 0 to 11
    """

    def __init__(self, run: StoredRun) -> None:
        self.run, self.run_dir = run, run.path
        self.tables = RunTables(run)
        self._masks: dict[str, NDArray[np.bool_]] = {}

    @classmethod
    def open(cls, run_dir: str | Path | FilesOfRun, factorization: str | None = None) -> ComponentStore:
        """Open a run directory. The run need not be complete.

        Args:
            run_dir: The run directory, or the folder ``factorizations/NAME`` of a run. Or a run, such as that which
                `npeff.run` returns, with its factorization.
            factorization: Name of the factorization. The default is ``default``, or the only one.

        Raises:
            QueryError: The directory does not exist or is not a run directory, or the run has no factorization of this
                name.
        """
        if isinstance(run_dir, FilesOfRun):
            run_dir, factorization = run_dir.path, factorization or run_dir.name
        path, named = run_and_name(location(run_dir))
        if not path.is_dir():
            wrong = "is a file" if path.exists() else "does not exist"
            raise QueryError(f"{path} {wrong}: give the directory of a run")
        if not any((path / name).exists() for name in ("run.yaml", "tables", "factorization.zarr")):
            raise QueryError(f"{path} is not a run directory: it has no run.yaml")
        try:
            refuse_unfinished_migration(path)
            return cls(StoredRun(path, chosen_factorization(path, factorization or named)))
        except StoreError as error:
            raise QueryError.of(error) from None

    @classmethod
    def of(cls, run: ComponentStore | str | Path | FilesOfRun) -> ComponentStore:
        """Return the store of a run: an open store, or one that `open` opens."""
        return run if isinstance(run, ComponentStore) else cls.open(run)

    def component(self, number: int) -> Component:
        """Return a component, with its examples and its card.

        Raises:
            QueryError: There is no such component.
        """
        from npeff.query.component import Component

        self._check_component(number)
        return Component(self, number)

    def _repr_html_(self) -> str:
        return html_of(self)

    @cached_property
    def coefficients(self) -> da.Array:
        """The coefficients W (N, K), non-negative, with NaN rows for invalid examples."""
        return _as_dask(self.stored_coefficients)

    @property
    def stored_coefficients(self) -> zarr.Array[Any]:
        """The stored array of `coefficients`. A slice of it is read at once, as a numpy array."""
        return self._factorization.coefficients

    @cached_property
    def evidence(self) -> da.Array:
        """The evidence ‖Â_i h_j‖² (N, K) of the components, with NaN rows for invalid examples.

        It is computed from the Fishers, and in memory, for factorizations of earlier versions.
        """
        import dask.array as da

        stored = self._factorization.evidence
        if stored is not None:
            return _as_dask(stored)
        return da.from_array(stored_evidence(self.tables, self._factorization, range(self._n_components)))

    @cached_property
    def direction_evidence(self) -> NDArray[np.float32]:
        """The evidence ‖Â_i d_j‖² (N, K) of the directions in parameter space, computed from their sketches.

        NaN rows for invalid examples, and NaN columns for components without a direction.

        Raises:
            QueryError: The directions or the Fishers are missing or damaged.
        """
        return direction_evidence(self.tables)

    def evidence_of(self, directions_KD: NDArray[np.floating]) -> NDArray[np.float32]:
        """Compute ‖Â_i d_j‖² (N, K) of any directions d in the sketch from the stored Fishers.

        Args:
            directions_KD: Directions, such as sketches of directions in parameter space. Directions of length 1 give
                numbers that can be compared with the evidence of components.

        Raises:
            QueryError: The Fishers are missing or damaged, or the directions have another dimension than the sketch.
        """
        return computed_evidence(self.tables, np.asarray(directions_KD))

    @cached_property
    def components(self) -> da.Array:
        """The components H (K, D), unit rows in the sketch."""
        return _as_dask(self._factorization.components)

    @cached_property
    def directions(self) -> Mapping[str, da.Array]:
        """The unit directions of the components in parameter space: parameter name to array (K, *shape)."""
        return {name: _as_dask(array) for name, array in self.direction_store.arrays.items()}

    @cached_property
    def direction_store(self) -> DirectionStore:
        """The stored directions. Their checksums are verified when they are read."""
        path = self.run.directions
        if not is_committed(path):
            raise missing(self.run, "directions.zarr", "lift")
        from npeff.store.direction_store import DirectionStore

        units = self.tables.record("lift").get("units", {})
        try:
            store = DirectionStore.open(path, {int(component): found for component, found in units.items()})
            self.tables.refuse_other_results("lift", path, store.attrs.get("lineage"))
        except StoreError as error:
            raise QueryError.of(error) from error
        return store

    @property
    def annotations(self) -> Annotations:
        """The names and notes of the components, which `npeff.annotate` writes.

        Raises:
            QueryError: The file with them is damaged.
        """
        return self.tables.annotations

    def name(self, component: int) -> str | None:
        """Return the name of a component; None if it has no name."""
        self._check_component(component)
        return self.annotations.name(component)

    @cached_property
    def cosines(self) -> np.ndarray:
        """Cosines of all pairs of components in the sketch, (K, K) float64; 0 for a zero component."""
        return self.unit_components @ self.unit_components.T

    def table(self, name: str) -> pa.Table:
        """Return a whole table, such as 'examples', 'coefficients' or 'verification'."""
        return self.tables.read(name)

    def components_table(self) -> pa.Table:
        """Return the components table with names and notes, and the KL ratio and best control of the informative sign.

        The added columns are `name`, `note`, `kl_ratio_matched_<examples>`, `best_control_<examples>` and
        `matched_<examples>`, or, for tables of earlier versions, `kl_ratio_<examples>_<plus|minus>` and
        `best_control_<examples>_<plus|minus>`.
        """
        return components_table(self.tables)

    def examples_where(self, where: str | None = None, split: str | None = None) -> NDArray[np.bool_]:
        """Return the mask (N,) of the examples that meet a SQL condition and belong to a split.

        Args:
            where: Condition on the columns of the examples table, `label_name` and `prediction_name`, such as
                "label = 2 and not correct"; see `npeff.query.filters`.
            split: "fit" or "held_out"; both by default.

        Raises:
            QueryError: The condition is not valid SQL or contains an unknown column, or the split is unknown.
        """
        if split not in (None, "fit", "held_out"):
            raise QueryError(f"there is no split '{split}': choose fit or held_out")
        chosen = [f"split = '{split}'"] if split else []
        masks = [self._mask(condition) for condition in ([where] if where is not None else []) + chosen]
        return np.logical_and.reduce(masks) if masks else np.ones(self._n_examples, dtype=bool)

    def top_examples(
        self,
        component: int,
        n: int = 20,
        split: str | None = None,
        where: str | None = None,
        by: By = "coefficient",
    ) -> pa.Table:
        """Return the `n` examples with the largest coefficients, or with the largest evidence, for a component.

        Args:
            component: The component.
            n: Number of examples.
            split: Only examples of this split, "fit" or "held_out".
            where: Only examples that meet this SQL condition; see `examples_where`.
            by: "coefficient", "evidence" or "direction_evidence", see `npeff.query.evidence`.

        Returns:
            Columns: rank (among these examples), coefficient or evidence (named as `by`), the columns of the examples
            table (without image and logits), and label_name and prediction_name if the task has class names.
        """
        self._check_component(component)
        _check_number(n, "examples")
        check_by(by)
        among_N = self.examples_where(where, split) if split or where is not None else None
        examples: list[int] = []
        values: list[float] = []
        for run in runs_of(self.tables, component) if by == "coefficient" else self._evidence_runs(by, [component]):
            chosen = slice(None) if among_N is None else among_N[run.examples]
            examples += run.examples[chosen][: n - len(examples)].tolist()
            values += run.coefficients[chosen][: n - len(values)].tolist()
            if len(examples) == n:
                break
        described = self.describe_examples(examples).add_column(0, by, pa.array(values, pa.float64()))
        return described.add_column(0, "rank", pa.array(range(len(examples)), pa.int64()))

    def example(self, example: int | str, by: By = "coefficient") -> pa.Table:
        """Return the components of one example, largest coefficient, or largest evidence, first.

        Args:
            example: Row number or id. A string is an id or, if there is no such id, a row number.
            by: "coefficient", "evidence" or "direction_evidence", see `npeff.query.evidence`.

        Returns:
            Columns: component, name (only if a component has a name), coefficient or evidence (named as `by`), share
            (fraction of the sum of the example's coefficients or evidence), rank (0-based, among all examples of the
            component).
        """
        check_by(by)
        index = self.example_number(example)
        if by == "coefficient":
            weights_K = self._weights(index)
        else:
            found_NK = self._evidence(by, range(self._n_components))
            weights_K, ranks_K = found_NK[index].astype(np.float64), (found_NK > found_NK[index]).sum(axis=0)
            weights_K = np.nan_to_num(weights_K)  # NaN for components without a direction
        components = np.flatnonzero(weights_K)
        components = components[np.argsort(-weights_K[components], kind="stable")]
        values = weights_K[components]
        by_coefficient = by == "coefficient"
        ranks = n_larger(self.tables, components.tolist(), values.tolist()) if by_coefficient else ranks_K[components]
        found = pa.table(
            {
                "component": components,
                by: values,
                "share": values / values.sum() if len(values) else values,
                "rank": pa.array(ranks, pa.int64()),
            }
        )
        return with_names(found, self.annotations)

    def neighbours(
        self, example: int | str, n: int = 20, split: str | None = None, where: str | None = None
    ) -> pa.Table:
        """Return the `n` examples with the most similar coefficients, by their cosine.

        Args:
            example: Row number or id, as in `example`.
            n: Number of examples.
            split: Only examples of this split, "fit" or "held_out".
            where: Only examples that meet this SQL condition; see `examples_where`.

        Returns:
            Columns: rank, cosine, shared_components (number of components of both examples), then the columns of
            `top_examples`. The example itself and examples without a shared component are left out.
        """
        index = self.example_number(example)
        return self._nearest_examples(self._weights(index), n, self.examples_where(where, split), without=index)

    def nearest(self, weights_K: NDArray[np.floating], n: int = 20) -> pa.Table:
        """Return the `n` examples whose coefficients are most similar to given ones, such as those of a new example.

        Args:
            weights_K: Coefficients (K,) of the components of this run.
            n: Number of examples.

        Returns:
            The columns of `neighbours`.
        """
        return self._nearest_examples(np.asarray(weights_K, np.float64), n, self.examples_where())

    def _nearest_examples(
        self, weights_K: NDArray[np.float64], n: int, among_N: NDArray[np.bool_], without: int | None = None
    ) -> pa.Table:
        _check_number(n, "examples")
        stored = self._factorization.coefficient_norms
        if stored is None:
            norms_N = neighbours.norms(self.tables, self._n_examples)
        else:
            norms_N = self._stored("coefficient_norms", stored, slice(None))
        cosines_N, shared_N = neighbours.cosines(self.tables, weights_K, norms_N)
        candidates = among_N & (shared_N > 0)
        if without is not None:
            candidates[without] = False
        found = np.flatnonzero(candidates)
        found = found[np.argsort(-cosines_N[found], kind="stable")[:n]]
        described = self.describe_examples(found.tolist())
        described = described.add_column(0, "shared_components", pa.array(shared_N[found], pa.int64()))
        described = described.add_column(0, "cosine", pa.array(cosines_N[found], pa.float64()))
        return described.add_column(0, "rank", pa.array(range(len(found)), pa.int64()))

    def similar_components(self, component: int, n: int = 10) -> pa.Table:
        """Return the `n` components that are most similar to a component, by |cos| in the sketch.

        The sign of a component is arbitrary.

        Returns:
            Columns: component, name (only if a component has a name), cosine, abs_cosine, shared_top_examples (number
            of listed top examples of both components).
        """
        self._check_component(component)
        found = _nearest(self.cosines[component], n, without=component)
        top = self._top_sets
        shared = [len(top.get(component, set()) & top.get(j, set())) for j in found["component"].to_pylist()]
        return with_names(found.append_column("shared_top_examples", pa.array(shared, pa.int64())), self.annotations)

    def similar_components_in(
        self, other: ComponentStore | str | Path | FilesOfRun, component: int, n: int = 10
    ) -> pa.Table:
        """Return the `n` components of another run that are most similar to a component, by |cos| in the sketch.

        Args:
            other: The other run, its path, or its store.
            component: The component of this run.
            n: Number of components.

        Returns:
            Columns: component (of the other run), name (only if one has a name), cosine, abs_cosine.

        Raises:
            QueryError: The runs differ in model, parameters, sketch or seed, or factorize diagonals.
        """
        self._check_component(component)
        other = ComponentStore.of(other)
        self.check_comparable(other)
        return with_names(_nearest(other.unit_components @ self.unit_components[component], n), other.annotations)

    def check_comparable(self, other: ComponentStore) -> None:
        """Check that the components of this run and of another run are in one space.

        Raises:
            QueryError: The runs differ in model, parameters, sketch or seed, or factorize diagonals.
        """
        from npeff.store.same_space import differences_in_space

        for store in (self, other):
            refuse_diagonals(store.tables, "only components in the sketch can be compared")
        if different := differences_in_space(self._fisher_attributes, other._fisher_attributes):
            raise QueryError(
                f"the components of {other.run_dir} and {self.run_dir} are not comparable, because the runs differ in "
                f"{', '.join(different)}: choose a run with the same model, parameters, sketch and seed"
            )

    def enriched(
        self,
        where: str,
        split: str | None = None,
        top: int | None = None,
        n: int | None = None,
        by: By = "coefficient",
    ) -> pa.Table:
        """Test which components are more frequent in a subset of the examples than in the other valid examples.

        An example has a component if its coefficient is above 0 or, with `top`, among the `top` largest. See
        `npeff.query.enrichment` for the test and its assumptions.

        Args:
            where: SQL condition for the subset; see `examples_where`.
            split: Only examples of this split, "fit" or "held_out".
            top: Number of top examples that count as having a component; by default, all with a coefficient above 0.
            n: Number of components to return; all by default.
            by: "coefficient", or "evidence" or "direction_evidence" to rank by them in place of coefficients, which
                needs `top`.

        Returns:
            One row per component, smallest p-value first. Columns: component, name (only if a component has a name),
            n_in_subset and n_outside (numbers of examples with the component), share_in_subset and share_outside (their
            fractions), odds_ratio, p_value (Fisher's exact test, one-sided), q_value (Benjamini-Hochberg over all
            components), mean_in_subset and mean_outside (mean coefficient or evidence, including zeros), auc
            (probability that a random example of the subset has a larger coefficient, or evidence, than a random one
            outside; equal values count half).

        Raises:
            QueryError: The condition is not valid, or is true for none or all of the examples; or `by` is
                another number than the coefficient, without `top`.
        """
        from npeff.query.enrichment import enriched

        for wanted, what in ((top, "top examples"), (n, "components")):
            if wanted is not None:
                _check_number(wanted, what)
        check_by(by)
        if by != "coefficient" and top is None:
            raise QueryError("evidence is above 0 for nearly every example: give top, such as --top 32")
        among_N = self.examples_where("valid", split)
        subset_N = self.examples_where(where) & among_N
        n_subset, n_all = int(subset_N.sum()), int(among_N.sum())
        if n_subset in (0, n_all):
            which = "none" if n_subset == 0 else "all"
            raise QueryError(
                f"the condition is true for {which} of the {n_all} valid examples: give one that selects a part of them"
            )
        components = range(self._n_components)
        runs = all_runs(self.tables) if by == "coefficient" else self._evidence_runs(by, components)
        return with_names(enriched(runs, len(components), subset_N, among_N, top).slice(0, n), self.annotations)

    def layer_energy(self, component: int, by: str = "parameter") -> pa.Table:
        """Return the fraction of the squared norm of a component's direction in each parameter or layer.

        Args:
            component: The component.
            by: "parameter", or "layer" to sum over the parameters of each module, such as weight and bias.

        Returns:
            Columns: parameter or layer, energy; largest energy first. The energies sum to 1.

        Raises:
            QueryError: The component is not lifted.
        """
        self._check_component(component)
        if by not in ("parameter", "layer"):
            raise QueryError(f"by must be parameter or layer, not '{by}'")
        rows = self.tables.read("layer_energy", ["parameter", "energy"], pc.field("component") == component)
        if not len(rows):
            raise QueryError(
                f"component {component} is not lifted: run `npeff lift {self.run.argument} -c {component}` first"
            )
        if by == "layer":
            layers = pc.replace_substring_regex(rows["parameter"], r"\.[^.]*$", "")
            rows = (
                pa.table({"layer": layers, "energy": rows["energy"]}).group_by("layer").aggregate([("energy", "sum")])
            )
            rows = rows.rename_columns({"energy_sum": "energy"})
        return rows.sort_by([("energy", "descending"), (by, "ascending")])

    def verification(self, component: int) -> pa.Table:
        """Return the rows of a component in the table `verification`; no rows if the component is not verified."""
        self._check_component(component)
        return self.tables.read("verification", None, pc.field("component") == component)

    def inputs(self, example: int | str | None = None, component: int | None = None) -> pa.Table:
        """Return the Fisher information of the inputs, which `npeff inputs` computes.

        Args:
            example: Row number or id, as in `example`: return the share of each position of this example.
            component: Return the mean share of each position, or of each token, over the top examples of this
                component (`npeff.query.input_information.mean_shares`).

        Returns:
            The table `inputs` by default, with the columns `id` and `class_name`. Otherwise the shares, largest first.

        Raises:
            QueryError: The stage has not explained the examples, or both arguments are given.
        """
        from npeff.query.input_information import explained_examples, mean_shares, shares_of_example

        if example is not None and component is not None:
            raise QueryError("give an example or a component, not both")
        if example is not None:
            return shares_of_example(self.tables, self.example_number(example))
        if component is None:
            return explained_examples(self.tables)
        self._check_component(component)
        top = self.tables.read("top_examples", ["example"], pc.field("component") == component)
        return mean_shares(self.tables, top["example"].unique().to_pylist())

    def paths(self, component: int | None = None) -> pa.Table:
        """Return the paths of the stage `scale`, or those of a component; see `npeff.query.paths.paths_of`."""
        return paths_of(self.tables, component)

    def sql(self, query: str, most_rows: int | None = None, timeout_s: float | None = None) -> pa.Table:
        """Run one SELECT statement over all tables of the run, in DuckDB's dialect. It has no other access.

        Args:
            query: The statement.
            most_rows: Number of rows after which the query ends. By default, all rows are returned.
            timeout_s: Time in seconds after which the statement is stopped. By default five minutes.

        Raises:
            QueryError: The statement is not valid, takes too long, or has a result of more than 1 GiB.
        """
        from npeff.query.sql import TIMEOUT_S, run_sql

        return run_sql(self.tables, query, most_rows, TIMEOUT_S if timeout_s is None else timeout_s)

    def summary(self) -> dict[str, Any]:
        """Return a summary of the run for JSON: counts, explained variance, accuracy, KL ratios, existing tables."""
        return summary(self.tables)

    def describe_examples(self, examples: list[int]) -> pa.Table:
        """Return rows of the examples table in the given order, without image and logits, with class names."""
        columns = [name for name in self.tables.columns("examples") if name not in _TOO_WIDE_TO_LIST]
        wanted = pa.array(examples, pa.int64())
        rows = self.tables.read_groups("examples", self.tables.groups_with("examples", "example", examples), columns)
        rows = rows.take(pc.index_in(wanted, value_set=rows["example"].combine_chunks()))
        names = self.class_names()
        for name, column in NAMED_CLASSES.items():
            if names and column in columns and name not in columns:
                named = [None if c is None else names.get(c, str(c)) for c in rows[column].to_pylist()]
                position = rows.column_names.index(column) + 1
                rows = rows.add_column(position, name, pa.array(named, pa.string()))
        return rows

    def class_names(self) -> dict[int, str]:
        """Return the class names by class number; empty if the task has no class names."""
        return self._class_names

    @cached_property
    def _class_names(self) -> dict[int, str]:
        if not self.tables.has("classes"):
            return {}
        rows = self.tables.read("classes", ["class", "name"]).to_pylist()
        return {row["class"]: row["name"] for row in rows}

    def metadata_columns(self) -> list[str]:
        """Return the columns of the examples table with metadata of the task."""
        return [name for name in self.tables.columns("examples") if name not in EXAMPLE_COLUMNS]

    @cached_property
    def _top_sets(self) -> dict[int, set[int]]:
        rows = self.tables.read("top_examples", ["component", "example"])
        sets: dict[int, set[int]] = {}
        for component, example in zip(rows["component"].to_pylist(), rows["example"].to_pylist(), strict=True):
            sets.setdefault(component, set()).add(example)
        return sets

    def _evidence(self, by: By, components: Sequence[int]) -> NDArray[np.float32]:
        if by == "evidence":
            return stored_evidence(self.tables, self._factorization, components)
        return self.direction_evidence[:, list(components)]

    def _evidence_runs(self, by: By, components: Sequence[int]) -> Iterable[Run]:
        return evidence_runs(self._evidence(by, components), components)

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
        """Return the coefficients (K,) of a valid example."""
        row = self._stored("coefficients", self._factorization.coefficients, index)
        if np.isnan(row).any():  # a missing chunk reads as NaN
            raise self._corrupt("coefficients")
        return row.astype(np.float64)

    @cached_property
    def unit_components(self) -> NDArray[np.float64]:
        """The normalized components (K, D); zero for a zero component."""
        rows = self._stored("components", self._factorization.components, slice(None)).astype(np.float64)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        result: NDArray[np.float64] = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
        return result

    def _stored(self, name: str, array: zarr.Array[Any], rows: int | slice) -> NDArray[Any]:
        try:
            return np.asarray(array[rows])
        except (ValueError, OSError) as error:  # the checksum of a chunk does not match, or the chunk is missing
            raise self._corrupt(name) from error

    def _corrupt(self, name: str) -> QueryError:
        path = self.run.factorization
        remedy = f"delete this store and run `npeff factorize {self.run.argument}` again"
        return QueryError(f"{name} of {path} are corrupt", remedy, path=path / name)

    @property
    def _fisher_attributes(self) -> dict[str, Any]:
        from npeff.store.fisher_store import FisherStore

        try:
            return FisherStore.read_attributes(self.run.fishers)
        except StoreError as error:
            raise QueryError.of(error) from error

    def example_number(self, example: int | str) -> int:
        """Return the row number of an example, given as in `example`.

        Raises:
            QueryError: There is no such example, or it is not the only one with this id, or it is not valid.
        """
        is_id = isinstance(example, str) and not any("\ud800" <= letter <= "\udfff" for letter in example)
        rows = self._examples_called("id", example) if is_id else []  # bytes that are not UTF-8 are no id
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
                f"{len(rows)} examples have the id {json.dumps(example)}: give a row number ({shown}, ...)"
            )
        if not rows[0]["valid"]:
            raise QueryError(
                f"example {json.dumps(example)} has no coefficients: its logits or gradients were not finite"
            )
        return int(rows[0]["example"])

    def _examples_called(self, column: str, value: int | str) -> list[dict[str, Any]]:
        groups = self.tables.groups_with("examples", column, [value])
        columns = ["example", "valid", column]
        result: list[dict[str, Any]] = (
            self.tables.read_groups("examples", groups, dict.fromkeys(columns))
            .filter(pc.field(column) == value)
            .to_pylist()
        )
        return result

    @cached_property
    def _factorization(self) -> StoredFactorization:
        path = self.run.factorization
        if not is_committed(path):
            raise missing(self.run, "factorization.zarr", "factorize")
        from npeff.store.component_store import open_factorization

        try:
            stored = open_factorization(path)
            self.tables.refuse_other_results("factorize", path, stored.attrs.get("lineage"))
            return stored
        except StoreError as error:
            raise QueryError.of(error) from error


def _as_dask(array: zarr.Array[Any]) -> da.Array:
    """Return a lazy view with one block per stored shard, or per chunk if the array is not sharded."""
    import dask.array as da

    result: da.Array = da.from_array(array, chunks=array.shards or array.chunks)
    return result


def _nearest(cosines_K: NDArray[np.float64], n: int, without: int | None = None) -> pa.Table:
    """Return the `n` components with the largest |cos|: component, cosine, abs_cosine."""
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
    if not 1 <= n < 2**63:
        raise QueryError(f"the number of {of_what} must be {'at least 1' if n < 1 else 'less than 2**63'}, not {n}")
