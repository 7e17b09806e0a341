"""Area under the ROC curve: how well a number separates marked examples from the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def area_under_curve(
    values_n: NDArray[np.floating], marked_n: NDArray[np.bool_], n_marked: int, n_unmarked: int
) -> float:
    """Compute the probability that a random marked example has a larger value than a random unmarked one.

    Equal values count half (the Mann-Whitney statistic). It is NaN without marked or without unmarked examples.

    Args:
        values_n: Values of some examples, not negative, descending. All other examples have the value 0.
        marked_n: Marks of these examples.
        n_marked: Number of all marked examples.
        n_unmarked: Number of all other examples.
    """
    if n_marked == 0 or n_unmarked == 0:
        return float("nan")
    marks = marked_n.astype(np.float64)
    starts = np.flatnonzero(np.append(True, values_n[1:] != values_n[:-1])) if len(values_n) else np.empty(0, np.int64)
    marked_v, sizes_v = np.add.reduceat(marks, starts) if len(starts) else marks, np.diff(starts, append=len(values_n))
    unmarked_v = sizes_v - marked_v
    below_v = n_unmarked - np.cumsum(unmarked_v)
    at_zero = (n_marked - marks.sum()) * (n_unmarked - unmarked_v.sum()) / 2
    wins = float((marked_v * (below_v + unmarked_v / 2)).sum() + at_zero)
    return wins / (n_marked * n_unmarked)
