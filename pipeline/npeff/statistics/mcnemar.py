"""McNemar's paired test of a change in accuracy, with a confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import scipy  # imports its subpackages on first use, which takes a second for scipy.stats
from numpy.typing import NDArray


@dataclass(frozen=True)
class McNemar:
    """Comparison of the predictions on the same examples before and after a change of the model."""

    n: int
    """Number of examples."""
    broken: int
    """b, the number of predictions that were correct before and are wrong after."""
    mended: int
    """c, the number of predictions that were wrong before and are correct after."""
    p_value: float
    """Exact two-sided p-value: the probability of a split of b + c at least as uneven if both changes are equally
    likely."""
    change: float
    """Change of the accuracy, (c − b)/n."""
    low: float
    """Lower end of the 95% confidence interval of the change. The change need not be the center of the interval."""
    high: float
    """Upper end of the interval."""


def mcnemar(correct_before_N: NDArray[np.bool_], correct_after_N: NDArray[np.bool_]) -> McNemar:
    """Compute McNemar's exact test and a paired confidence interval.

    The test is a binomial test on the b + c examples whose correctness changed. The interval is the Wald interval with
    half an example added to each of the four cells: d ± z √((b + c + 1) − (c − b)²/(n + 2)) / (n + 2),
    d = (c − b)/(n + 2) (Agresti & Min, Statistics in Medicine 24, 2005, 729-740), clipped to [-1, 1].

    Args:
        correct_before_N: Whether the prediction on each example is correct before the change.
        correct_after_N: Whether the prediction on each example is correct after the change.

    Returns:
        Counts, p-value, change and interval.

    Raises:
        ValueError: There are no examples, or the arrays have different shapes.
    """
    if correct_before_N.shape != correct_after_N.shape or not correct_before_N.size:
        raise ValueError("correct_before_N and correct_after_N must cover the same examples, at least one")
    n = correct_before_N.size
    broken = int((correct_before_N & ~correct_after_N).sum())
    mended = int((~correct_before_N & correct_after_N).sum())
    difference, n_added = mended - broken, n + 2
    spread = math.sqrt(broken + mended + 1 - difference**2 / n_added)
    margin = NormalDist().inv_cdf(0.975) * spread / n_added
    middle = difference / n_added
    p_value = float(scipy.stats.binomtest(mended, broken + mended).pvalue) if broken + mended else 1.0
    return McNemar(n, broken, mended, p_value, difference / n, max(-1.0, middle - margin), min(1.0, middle + margin))
