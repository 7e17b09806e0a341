"""Enrichment of components in a subset of the examples.

The test uses the valid examples, or the valid examples of one split. An example has a component if its coefficient is
above 0 or, with `top`, if the coefficient is among the `top` largest of these examples. This depends only on the
coefficients. Under the null hypothesis that the subset is independent of a component, the number of examples of the
subset with the component is hypergeometric. The p-value is the probability of a number as large or larger (Fisher's
exact test, one-sided). The q-value is that of Benjamini and Hochberg over all components. On the fit examples, the
values are only descriptive; use split "held_out" for inference.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.query.coefficients import all_runs
from npeff.query.tables import RunTables
from npeff.statistics.contingency import exact_tests


def enriched(
    tables: RunTables, n_components: int, subset_N: NDArray[np.bool_], among_N: NDArray[np.bool_], top: int | None
) -> pa.Table:
    """Test the enrichment of every component in a subset of the examples.

    Args:
        tables: The tables of the run.
        n_components: Number of components K.
        subset_N: Mask (N,) of the subset. Examples outside `among_N` are ignored.
        among_N: Mask (N,) of the examples in the test.
        top: Number of top examples that count as having a component; None for all examples with a coefficient above 0.

    Returns:
        One row per component, smallest p-value first, with the columns of `ComponentStore.enriched`.
    """
    subset_N = subset_N & among_N
    n_all, n_subset = int(among_N.sum()), int(subset_N.sum())
    counts_2K = np.zeros((2, n_components), dtype=np.int64)
    sums_2K = np.zeros((2, n_components))
    for run in all_runs(tables):
        counted = among_N[run.examples]
        inside = subset_N[run.examples]
        outside = counted & ~inside
        for row, chosen in enumerate((inside, outside)):
            sums_2K[row, run.component] += run.coefficients[chosen].sum()
        if top is not None:
            missing = top - counts_2K[:, run.component].sum()
            counted &= np.cumsum(counted) <= missing
        counts_2K[:, run.component] += (counted & inside).sum(), (counted & outside).sum()
    both_K, n_with_K = counts_2K[0], counts_2K.sum(axis=0)
    tests = exact_tests(n_all, n_subset, n_with_K, both_K)
    with np.errstate(divide="ignore", invalid="ignore"):
        table = {
            "component": np.arange(n_components),
            "n_in_subset": both_K,
            "n_outside": counts_2K[1],
            "share_in_subset": both_K / n_subset,
            "share_outside": counts_2K[1] / (n_all - n_subset),
            "odds_ratio": tests.odds_ratios_K,
            "p_value": tests.p_values_K,
            "q_value": tests.q_values_K,
            "mean_in_subset": sums_2K[0] / n_subset,
            "mean_outside": sums_2K[1] / (n_all - n_subset),
        }
    order = np.lexsort((-np.nan_to_num(tests.odds_ratios_K), tests.p_values_K))
    return pa.table(table).take(pa.array(order))
