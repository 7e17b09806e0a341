"""Fisher's exact test of 2 × 2 tables: are marked examples over-represented in a group of examples?

Legend: N examples, K groups (for example, the examples with a component).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy  # imports its subpackages on first use, which takes a second for scipy.stats
from numpy.typing import NDArray


@dataclass(frozen=True)
class ExactTests:
    """Test results of K groups."""

    odds_ratios_K: NDArray[np.float64]
    """Sample odds ratio: the odds of a marked example inside the group over the odds outside. Infinite if the group
    contains all marked examples or only marked examples, NaN if the ratio is 0/0."""
    p_values_K: NDArray[np.float64]
    """Probability of at least the observed number of marked examples, if the group were drawn at random without
    replacement. 1 for an empty group."""
    q_values_K: NDArray[np.float64]
    """Adjusted p-values. Rejecting all hypotheses with q ≤ α controls the false discovery rate at α (Benjamini &
    Hochberg, Journal of the Royal Statistical Society B 57, 1995, 289-300)."""


def exact_tests(n_all: int, n_marked: int, n_in_K: NDArray[np.int64], n_both_K: NDArray[np.int64]) -> ExactTests:
    """Compute one-sided Fisher's exact tests (hypergeometric tests) for many groups.

    Args:
        n_all: Number of examples.
        n_marked: Number of marked examples.
        n_in_K: Number of examples in each group.
        n_both_K: Number of marked examples in each group.

    Returns:
        Odds ratios, p-values and q-values.
    """
    unmarked_in_K = n_in_K - n_both_K
    marked_out_K = n_marked - n_both_K
    unmarked_out_K = n_all - n_marked - unmarked_in_K
    with np.errstate(divide="ignore", invalid="ignore"):
        # floats, because the products of large counts overflow integers
        odds_ratios_K = (n_both_K.astype(float) * unmarked_out_K) / (unmarked_in_K.astype(float) * marked_out_K)
    p_values_K = np.minimum(scipy.stats.hypergeom.sf(n_both_K - 1, n_all, n_marked, n_in_K), 1.0)
    return ExactTests(odds_ratios_K, p_values_K, q_values(p_values_K, len(p_values_K)))


def q_values(p_values_K: NDArray[np.float64], n_tests: int) -> NDArray[np.float64]:
    """Compute the q-values of K of `n_tests` tests with the Benjamini-Hochberg procedure.

    The p-value of each of the other `n_tests` - K tests is taken to be 1.
    """
    order = np.argsort(p_values_K, kind="stable")
    scaled = p_values_K[order] * n_tests / np.arange(1, len(order) + 1)
    found = np.empty_like(p_values_K)
    found[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return found
