"""Which components a subset of the examples has more of than the others.

The examples in question are the valid ones (of one split, where that is asked for). Each has a component or has not:
its coefficient is above 0 or, with `top`, among the so many largest of these examples. That is settled by the
coefficients alone, so if belonging to the subset had nothing to do with a component, the number of the subset's
examples with it would be hypergeometric. The p-value is the chance of a number as large or larger (Fisher's exact test,
one-sided), the q-value that of Benjamini and Hochberg over all components. On the examples that the components were
fitted on they describe; for a claim, take split "held_out".
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
    """One row per component, the surest first; see `ComponentStore.enriched` for the columns.

    Args:
        subset_N: marks the subset; those that are not in `among_N` do not count.
        among_N: marks the examples in question.
        top: None for all examples with a coefficient above 0.
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
