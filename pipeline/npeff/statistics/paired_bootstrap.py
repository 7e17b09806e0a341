"""Bootstrap intervals of means, and of the difference of two means that were measured on the same examples.

The intervals are percentile intervals of `scipy.stats.bootstrap`. Values of one example that belong together, such as
those of several models on the same image, are one observation: they are drawn together (cluster bootstrap).

Legend: N values, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # imports its subpackages on first use, which takes a second for scipy.stats
from numpy.typing import NDArray

from npeff.statistics.ratio_intervals import DRAWS, LEVEL


@dataclass(frozen=True)
class Interval:
    """A mean with its central 95% bootstrap interval."""

    mean: float
    """NaN if there is no value."""
    low: float
    """NaN if there are fewer than two groups with a value."""
    high: float
    n: int
    """Number of values in the mean."""


def mean_interval(values_N: NDArray[np.floating], groups_N: NDArray[Any] | None = None, seed: int = 0) -> Interval:
    """Compute the mean of values and its 95% interval.

    Args:
        values_N: The values. NaN values are left out.
        groups_N: Numbers or names of the groups of values that are drawn together. None: each value is a group.
        seed: Seed of the draws.
    """
    known_N = ~np.isnan(values_N)
    values_N = np.asarray(values_N[known_N], np.float64)
    if not len(values_N):
        return Interval(math.nan, math.nan, math.nan, 0)
    groups_N = np.arange(len(known_N)) if groups_N is None else groups_N
    _, of_N = np.unique(groups_N[known_N], return_inverse=True)
    sums_G, counts_G = np.bincount(of_N, values_N), np.bincount(of_N).astype(np.float64)
    mean = float(values_N.mean())
    if len(sums_G) < 2:
        return Interval(mean, math.nan, math.nan, len(values_N))
    found = scipy.stats.bootstrap(
        (sums_G, counts_G),
        _ratio,
        paired=True,
        vectorized=True,
        n_resamples=DRAWS,
        batch=max(1, 2**22 // len(sums_G)),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), len(values_N))


def paired_difference(
    first_N: NDArray[np.floating], second_N: NDArray[np.floating], groups_N: NDArray[Any] | None = None, seed: int = 0
) -> Interval:
    """Compute the mean of first − second and its 95% interval.

    Args:
        first_N: Values of the first method.
        second_N: Values of the second method on the same examples. A pair with a NaN is left out.
        groups_N: As for `mean_interval`.
        seed: Seed of the draws.

    Raises:
        ValueError: The arrays have different shapes.
    """
    if first_N.shape != second_N.shape:
        raise ValueError(f"paired values must have one shape, not {first_N.shape} and {second_N.shape}")
    return mean_interval(first_N.astype(np.float64) - second_N, groups_N, seed)


def _ratio(sums_G: NDArray[np.float64], counts_G: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = sums_G.sum(axis) / counts_G.sum(axis)
    return ratios
