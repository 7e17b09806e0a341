"""Evidence of components: e_ij = h_jᵀ F̂_i h_j = ‖Â_i h_j‖², how strong a direction of the sketch is in an example.

It is stored beside the coefficients. For factorizations of earlier versions, and for other directions than the
components, such as the whitened directions of the lift, it is computed from the stored Fishers.

Shapes: N examples, n of a block, R rank, D sketch, K directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from npeff.query.coefficients import Run
from npeff.query.errors import QueryError
from npeff.query.tables import RunTables
from npeff.storage.errors import StoreError

if TYPE_CHECKING:
    from npeff.store.component_store import StoredFactorization

By = Literal["coefficient", "evidence", "direction_evidence"]
"""The number by which examples are ranked for a component: its coefficient, the evidence of the component, or the
evidence of its direction in parameter space."""


def check_by(by: str) -> None:
    """Check a value of `By`. Raises QueryError."""
    if by not in get_args(By):
        raise QueryError(f"by must be one of {', '.join(get_args(By))}, not '{by}'")


def direction_evidence(tables: RunTables) -> NDArray[np.float32]:
    """Compute the evidence (N, K) of the stored directions, NaN for invalid examples and components without direction.

    Raises:
        QueryError: The directions or the Fishers are missing or damaged.
    """
    from npeff.store.direction_sketches import direction_sketches

    try:
        sketches_KD = direction_sketches(tables.run)
    except StoreError as error:
        raise QueryError(error.problem, error.remedy, path=error.path) from error
    return computed_evidence(tables, sketches_KD)


def refuse_diagonals(tables: RunTables, what: str) -> None:
    """Check that the components are in the sketch. Raises QueryError for components of diagonals."""
    kind = tables.record("factorize").get("factorized", "fishers")
    if kind.startswith("diagonal_"):
        raise QueryError(f"the components of {tables.run_dir} are of kind {kind}, which are not in the sketch: {what}")


def stored_evidence(tables: RunTables, stored: StoredFactorization, columns: Sequence[int]) -> NDArray[np.float32]:
    """Return the evidence (N, k) of some components, with NaN rows for invalid examples.

    Raises:
        QueryError: The components are of diagonals, the array is damaged, or it is not stored and the Fishers from
            which it can be computed are missing or damaged.
    """
    refuse_diagonals(tables, "they have no evidence; use coefficients")
    if stored.evidence is None:
        components_KD = np.asarray(stored.components[...])[list(columns)]
        return computed_evidence(tables, components_KD)
    rows = (stored.evidence.shards or stored.evidence.chunks)[0]
    found_Nk = np.empty((stored.evidence.shape[0], len(columns)), np.float32)
    try:
        for start in range(0, len(found_Nk), rows):
            found_Nk[start : start + rows] = np.asarray(stored.evidence[start : start + rows])[:, list(columns)]
    except (ValueError, OSError) as error:  # the checksum of a chunk does not match
        raise _corrupt(tables, stored) from error
    valid_N = tables.read("examples", ["valid"])["valid"].to_numpy()
    if np.isnan(found_Nk[valid_N]).any():  # a missing chunk reads as NaN
        raise _corrupt(tables, stored)
    return found_Nk


def computed_evidence(tables: RunTables, directions_KD: NDArray[np.floating]) -> NDArray[np.float32]:
    """Compute the evidence (N, K) of directions of the sketch from the stored Fishers, NaN for invalid examples.

    One shard is in memory at a time.

    Raises:
        QueryError: The Fishers are missing or damaged, or the directions have another dimension than the sketch.
    """
    from npeff.store.fisher_store import FisherStore

    try:
        store = FisherStore.open(tables.run.fishers)
        if directions_KD.ndim != 2 or directions_KD.shape[1] != store.dim:
            raise QueryError(f"directions must have the shape (K, {store.dim}), not {directions_KD.shape}")
        found_NK = np.full((store.plan.n_examples, len(directions_KD)), np.nan, np.float32)
        for shard, (start, stop) in enumerate(store.plan):
            arrays = store.read_shard(shard, None, ("factors", "valid"))
            valid_n, factors_nRD = arrays["valid"], arrays["factors"].astype(np.float64)
            products_nRK = factors_nRD[valid_n] @ directions_KD.T.astype(np.float64)
            found_NK[start:stop][valid_n] = np.square(products_nRK).sum(axis=1)
    except StoreError as error:
        problem = f"the evidence is computed from the Fishers, which cannot be read: {error.problem}"
        raise QueryError(problem, error.remedy, path=error.path) from error
    return found_NK


def evidence_runs(found_NK: NDArray[np.float32], columns: Sequence[int]) -> Iterator[Run]:
    """Yield the examples of each component with evidence above 0, in descending order.

    Args:
        found_NK: Evidence of these components.
        columns: The components.
    """
    for component, column_N in zip(columns, found_NK.T, strict=True):
        values_N = np.nan_to_num(column_N.astype(np.float64))
        examples = np.flatnonzero(values_N > 0)
        examples = examples[np.argsort(-values_N[examples], kind="stable")]
        yield Run(component, examples, values_N[examples])


def _corrupt(tables: RunTables, stored: StoredFactorization) -> QueryError:
    remedy = f"delete this store and run `npeff factorize {tables.run.argument}` again"
    return QueryError(f"evidence of {stored.path} is corrupt", remedy, path=stored.path / "evidence")
