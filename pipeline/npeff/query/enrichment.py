"""Enrichment of components in a subset of the examples.

The test uses the valid examples, or the valid examples of one split. An example has a component if its coefficient is
above 0 or, with `top`, if the coefficient is among the `top` largest of these examples. Evidence can take the place of
the coefficients. The test depends only on these numbers. Under the null hypothesis that the subset is independent of a
component, the number of examples of the subset with the component is hypergeometric. The p-value is the probability of
a number as large or larger (Fisher's exact test, one-sided). The q-value is that of Benjamini and Hochberg over all
components. On the fit examples, the values are only descriptive; use split "held_out" for inference.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.query.coefficients import Run
from npeff.statistics.auc import area_under_curve
from npeff.statistics.contingency import exact_tests


def enriched(
    runs: Iterable[Run], n_components: int, subset_N: NDArray[np.bool_], among_N: NDArray[np.bool_], top: int | None
) -> pa.Table:
    """Test the enrichment of every component in a subset of the examples.

    Args:
        runs: The examples with a coefficient, or with evidence, above 0: by component, and descending within each.
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
    auc_K = np.full(n_components, 0.5)
    for component, own in groupby(runs, key=attrgetter("component")):
        listed = []
        for run in own:
            counted = among_N[run.examples]
            inside = subset_N[run.examples]
            outside = counted & ~inside
            listed.append((run.coefficients[counted], inside[counted]))
            for row, chosen in enumerate((inside, outside)):
                sums_2K[row, component] += run.coefficients[chosen].sum()
            if top is not None:
                missing = top - counts_2K[:, component].sum()
                counted &= np.cumsum(counted) <= missing
            counts_2K[:, component] += (counted & inside).sum(), (counted & outside).sum()
        values, marks = (np.concatenate(parts) for parts in zip(*listed, strict=True))
        auc_K[component] = area_under_curve(values, marks, n_subset, n_all - n_subset)
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
            "auc": auc_K,
        }
    order = np.lexsort((-np.nan_to_num(tests.odds_ratios_K), tests.p_values_K))
    return pa.table(table).take(pa.array(order))
