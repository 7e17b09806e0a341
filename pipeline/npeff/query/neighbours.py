"""Nearest neighbours of an example, by the cosine of rows of the coefficients W."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from npeff.query.coefficients import all_runs, runs_of
from npeff.query.tables import RunTables


def cosines(
    tables: RunTables, weights_K: NDArray[np.float64], norms_N: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Compute the cosines between one example's coefficients and those of every example.

    Only the components with a coefficient for the example are read, one at a time.

    Args:
        tables: The tables of the run.
        weights_K: Coefficients (K,) of the example.
        norms_N: Norms (N,) of the rows of W.

    Returns:
        The cosines (N,), which are 0 for an example without coefficients, and the numbers (N,) of shared components.
    """
    products_N = np.zeros(len(norms_N))
    shared_N = np.zeros(len(norms_N), dtype=np.int64)
    for component in np.flatnonzero(weights_K).tolist():
        for run in runs_of(tables, component):
            products_N[run.examples] += weights_K[component] * run.coefficients
            shared_N[run.examples] += 1
    scale_N = np.nan_to_num(norms_N) * np.linalg.norm(weights_K)
    return np.divide(products_N, scale_N, out=np.zeros_like(products_N), where=scale_N > 0), shared_N


def norms(tables: RunTables, n_examples: int) -> NDArray[np.float64]:
    """Return the norms (N,) of the rows of W from the whole table, for a store without these norms."""
    squares_N = np.zeros(n_examples)
    for run in all_runs(tables):
        squares_N[run.examples] += run.coefficients**2
    return np.sqrt(squares_N)
