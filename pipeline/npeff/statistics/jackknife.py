"""Confidence intervals by a jackknife that leaves out one group of examples at a time."""

from __future__ import annotations

import numpy as np
import scipy  # imports its subpackages on first use, which takes a second for scipy.stats
from numpy.typing import ArrayLike

LEVEL = 0.95


def jackknife_interval(value: float, without: ArrayLike, sizes: ArrayLike) -> tuple[float, float] | None:
    """Return the ends of a 95% interval of a statistic: value ± t·s with the t-distribution of G − 1 degrees.

    s² is the delete-a-group variance for groups of any sizes (Busing, Meijer & van der Leeden, Statistics and Computing
    9 (1999)). For equal sizes, it is (G − 1)/G Σ (θ_g − mean θ)².

    Args:
        value: The statistic of all examples.
        without: The statistic without each group (G,).
        sizes: The number of examples of each group (G,), at least 1.

    Returns:
        The ends; None if there are fewer than two groups.
    """
    without_G, sizes_G = np.asarray(without, np.float64), np.asarray(sizes, np.float64)
    n_groups = len(sizes_G)
    if n_groups < 2:
        return None
    inverse_G = sizes_G.sum() / sizes_G
    estimate = n_groups * value - ((1 - 1 / inverse_G) * without_G).sum()
    pseudo_G = inverse_G * value - (inverse_G - 1) * without_G
    variance = float((np.square(pseudo_G - estimate) / (inverse_G - 1)).mean())
    half = float(scipy.special.stdtrit(n_groups - 1, (1 + LEVEL) / 2)) * variance**0.5
    return value - half, value + half
