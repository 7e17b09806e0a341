"""Is a group of examples over-represented in another: Fisher's exact test of 2 × 2 tables, for many groups at once.

Legend: N examples, K groups (such as the examples with a component).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class ExactTests:
    """Arrays of K."""

    odds_ratios_K: NDArray[np.float64]
    """Odds of being marked in the group over those outside, as counted; infinite if all marked ones are in the group
    or all of the group is marked, NaN if that is 0/0."""
    p_values_K: NDArray[np.float64]
    """P(so many marked ones or more) if the group were drawn at random without replacement; 1 where it is empty."""
    q_values_K: NDArray[np.float64]
    """To call significant all with q ≤ α keeps the expected share of false ones among them at most α (Benjamini &
    Hochberg, Journal of the Royal Statistical Society B 57, 1995, 289-300)."""


def exact_tests(n_all: int, n_marked: int, n_in_K: NDArray[np.int64], n_both_K: NDArray[np.int64]) -> ExactTests:
    """One-sided hypergeometric tests (Fisher's exact test).

    Args:
        n_all: examples in all.
        n_marked: of these, marked ones.
        n_in_K: of all examples, those in each group.
        n_both_K: marked ones in each group.
    """
    unmarked_in_K = n_in_K - n_both_K
    marked_out_K = n_marked - n_both_K
    unmarked_out_K = n_all - n_marked - unmarked_in_K
    with np.errstate(divide="ignore", invalid="ignore"):
        # in floats: the products of large counts do not fit into integers
        odds_ratios_K = (n_both_K.astype(float) * unmarked_out_K) / (unmarked_in_K.astype(float) * marked_out_K)
    p_values_K = np.minimum(stats.hypergeom.sf(n_both_K - 1, n_all, n_marked, n_in_K), 1.0)
    return ExactTests(odds_ratios_K, p_values_K, q_values(p_values_K, len(p_values_K)))


def q_values(p_values_K: NDArray[np.float64], n_tests: int) -> NDArray[np.float64]:
    """Benjamini-Hochberg, where all further of the `n_tests` tests have a p-value of 1."""
    order = np.argsort(p_values_K, kind="stable")
    scaled = p_values_K[order] * n_tests / np.arange(1, len(order) + 1)
    found = np.empty_like(p_values_K)
    found[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return found
