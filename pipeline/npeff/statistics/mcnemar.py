"""McNemar's paired test of a change in accuracy, with an interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class McNemar:
    """Predictions of the same examples before and after a change of the model."""

    n: int
    broken: int
    """b: right before and wrong after."""
    mended: int
    """c: wrong before and right after."""
    p_value: float
    """Exact, two-sided: how likely a split at least as uneven is if a change breaks as often as it mends."""
    change: float
    """Of the accuracy, (c − b)/n."""
    low: float
    high: float
    """Ends of the 95% confidence interval of the change, of which it need not be the middle."""


def mcnemar(correct_before_N: NDArray[np.bool_], correct_after_N: NDArray[np.bool_]) -> McNemar:
    """McNemar's exact test and a paired interval.

    The test is binomial on the b + c examples that changed. The interval is Wald's with half an example added to each
    of the four cells: d ± z √((b + c + 1) − (c − b)²/(n + 2)) / (n + 2), d = (c − b)/(n + 2) (Agresti & Min, Statistics
    in Medicine 24, 2005, 729-740), cut off at ±1. Raises ValueError without examples, or for unequal numbers of them.
    """
    if correct_before_N.shape != correct_after_N.shape or not correct_before_N.size:
        raise ValueError("the same examples, at least one, must be given before and after")
    n = correct_before_N.size
    broken = int((correct_before_N & ~correct_after_N).sum())
    mended = int((~correct_before_N & correct_after_N).sum())
    difference, n_added = mended - broken, n + 2
    spread = math.sqrt(broken + mended + 1 - difference**2 / n_added)
    margin = NormalDist().inv_cdf(0.975) * spread / n_added
    middle = difference / n_added
    p_value = float(stats.binomtest(mended, broken + mended).pvalue) if broken + mended else 1.0
    return McNemar(n, broken, mended, p_value, difference / n, max(-1.0, middle - margin), min(1.0, middle + margin))
