"""Bootstrap confidence intervals of KL ratios.

A ratio of two means over a few dozen examples is uncertain. The bootstrap resamples both groups of examples with
replacement (B. Efron & R. Tibshirani, An introduction to the bootstrap, 1993, chapter 13: percentile intervals). The
resampled ratios yield the interval and the comparison with the controls. All directions are compared on the same draws,
because they were measured on the same examples. The step size is fixed, so the interval does not include the variation
from its choice on the top examples.

A baseline example that matches several top examples counts several times in the mean, but it is one observation. The
draws are therefore over the distinct baseline examples, and each drawn example brings all of its counts (cluster
bootstrap).

Legend: n top examples, m distinct baseline examples, S draws.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # imports its subpackages on first use, which takes a second for scipy.stats
from numpy.typing import NDArray

from npeff.statistics.auc import area_under_curve

DRAWS = 2000
LEVEL = 0.95

KL_ROUNDING = 1e-12
"""Mean KL divergence (nats) that rounding of float32 logits can cause. Smaller baseline means are raised to it."""


LEAST_KL = 1e-7
"""Mean KL divergence (nats) below which rounding in float32 may cause a part of it. It is not an effect of a step."""


@dataclass(frozen=True)
class Measured:
    """One value per example of both groups: KL divergences, or Fisher norms. NaN where an example has no value."""

    top_n: NDArray[np.float64]
    baseline_m: NDArray[np.float64]
    counts_m: NDArray[np.int64] | None = None
    """Number of times that a baseline example counts in the mean; once each if None."""

    @property
    def baseline_counts_m(self) -> NDArray[np.int64]:
        """The counts of the baseline examples; 0 where an example has no value."""
        counts_m = np.ones(len(self.baseline_m), np.int64) if self.counts_m is None else self.counts_m
        return np.where(np.isnan(self.baseline_m), 0, counts_m)

    @property
    def top_mean(self) -> float:
        """The mean over the top examples; NaN if none has a value."""
        return _mean(self.top_n, (~np.isnan(self.top_n)).astype(np.int64))

    @property
    def baseline_mean(self) -> float:
        """The mean over the baseline examples, with their counts; NaN if none has a value."""
        return _mean(self.baseline_m, self.baseline_counts_m)

    @property
    def ratio(self) -> float:
        """The mean over the top examples divided by the mean over the baseline examples; NaN if either is NaN."""
        baseline = self.baseline_mean
        return self.top_mean / (baseline if math.isnan(baseline) else max(baseline, KL_ROUNDING))

    @property
    def auc(self) -> float:
        """The probability that a top example has a larger value than a baseline example, with ties counted as half.

        This is the area under the ROC curve (the Mann-Whitney statistic). NaN if a group has no value.
        """
        top_n = self.top_n[~np.isnan(self.top_n)]
        baseline_n = np.repeat(self.baseline_m, self.baseline_counts_m)
        values_n = np.concatenate([top_n, baseline_n])
        order_n = np.argsort(-values_n, kind="stable")
        is_top_n = np.arange(len(values_n)) < len(top_n)
        return area_under_curve(values_n[order_n], is_top_n[order_n], len(top_n), len(baseline_n))


@dataclass(frozen=True)
class Confidence:
    """Confidence interval of a KL ratio, and its comparison with the controls."""

    low: float
    """Lower end of the central 95% interval."""
    high: float
    """Upper end of the central 95% interval."""
    above_controls: bool
    """Whether, in at least 95% of the draws, the ratio is above 1 and above the ratios of all controls in that draw."""


def confidence(own: Measured, controls: Sequence[Measured], seed: int) -> Confidence:
    """Compute the confidence interval of ``own.ratio`` and compare it with its controls on the same examples.

    Args:
        own: KL divergences of the direction.
        controls: KL divergences or Fisher norms of the controls on the same examples.
        seed: Seed of the draws.

    Returns:
        The interval and the comparison. NaN and False if a group has no value.
    """
    if math.isnan(own.ratio):
        return Confidence(math.nan, math.nan, False)
    own_S = ratio_draws(own, seed)
    threshold_S = np.max([np.ones(DRAWS), *(ratio_draws(control, seed) for control in controls)], axis=0)
    low, high = np.nanquantile(own_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Confidence(float(low), float(high), bool(np.mean(own_S > threshold_S) >= LEVEL))


def ratio_draws(measured: Measured, seed: int) -> NDArray[np.float64]:
    """Return the ratio in each draw of the examples, (S,). With the same seed, the draws are those of `confidence`."""
    top_Sn, baseline_Sm = _draws(seed, len(measured.top_n), len(measured.baseline_m))
    with np.errstate(invalid="ignore"):
        top_S = _means(measured.top_n, (~np.isnan(measured.top_n)).astype(np.int64), top_Sn)
        baseline_S = _means(measured.baseline_m, measured.baseline_counts_m, baseline_Sm)
        ratios_S: NDArray[np.float64] = top_S / np.maximum(baseline_S, KL_ROUNDING)
    return ratios_S


def median_interval(values: NDArray[np.floating], seed: int = 0) -> tuple[float, float]:
    """Return the central 95% bootstrap interval of the median of values, such as the KL ratios of all components.

    Args:
        values: The values, at least one. They may be infinite.
        seed: Seed of the draws.
    """
    drawn = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    sorted_Sn = np.sort(values[drawn], axis=1)  # np.median and np.quantile give NaN for infinite values
    medians_S = (sorted_Sn[:, (len(values) - 1) // 2] + sorted_Sn[:, len(values) // 2]) / 2
    low, high = np.quantile(medians_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


def rank_correlation(coefficients_n: NDArray[np.floating], kl_n: NDArray[np.floating]) -> float | None:
    """Compute Spearman's rank correlation over the examples that have both values.

    Return None if there are fewer than two such examples, or if one of the variables is constant.
    """
    known = ~(np.isnan(coefficients_n) | np.isnan(kl_n))
    x_n, y_n = coefficients_n[known], kl_n[known]
    if len(x_n) < 2 or np.ptp(x_n) == 0 or (y_n == y_n[0]).all():
        return None
    return float(scipy.stats.spearmanr(x_n, y_n).statistic)


def _mean(values: NDArray[np.float64], counts: NDArray[np.int64]) -> float:
    total = int(counts.sum())
    return float((np.where(counts > 0, values, 0.0) * counts).sum() / total) if total else math.nan


@functools.lru_cache(maxsize=2)  # both signs of a direction have the same two baselines
def _draws(seed: int, n_top: int, n_baseline: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw positions of top examples (S, n) and of baseline examples (S, m). Callers do not change them."""
    generator = np.random.default_rng(seed)
    top_Sn = generator.integers(n_top, size=(DRAWS, n_top))
    return top_Sn, generator.integers(n_baseline, size=(DRAWS, n_baseline))


def _means(values: NDArray[np.float64], counts: NDArray[np.int64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the mean of each draw, with the counts of the values; NaN if all counts of a draw are 0."""
    counted_once = bool((counts == 1).all())
    totals = np.full(len(drawn), drawn.shape[1]) if counted_once else counts.take(drawn).sum(axis=1)
    sums = (np.where(counts > 0, values, 0.0) * counts).take(drawn).sum(axis=1)  # faster than an index
    result: NDArray[np.float64] = np.divide(sums, totals, out=np.full(len(drawn), np.nan), where=totals > 0)
    return result
