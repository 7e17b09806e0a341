"""Bootstrap confidence intervals of KL ratios.

A ratio of two means over a few dozen examples is uncertain. The bootstrap resamples both groups of examples with
replacement (B. Efron & R. Tibshirani, An introduction to the bootstrap, 1993, chapter 13: percentile intervals). The
resampled ratios yield the interval and the comparison with the controls. All directions are compared on the same draws,
because they were measured on the same examples. The step size is fixed, so the interval does not include the variation
from its choice on the top examples.

Legend: n top examples, m baseline examples, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

DRAWS = 2000
LEVEL = 0.95

KL_ROUNDING = 1e-12
"""Mean KL divergence (nats) that rounding of float32 logits can cause. Smaller baseline means are raised to it."""


@dataclass(frozen=True)
class Measured:
    """One value per example of both groups: KL divergences, or Fisher norms. NaN where an example has no value."""

    top_n: NDArray[np.float64]
    baseline_m: NDArray[np.float64]

    @property
    def ratio(self) -> float:
        """The mean over the top examples divided by the mean over the baseline examples."""
        return float(np.nanmean(self.top_n)) / max(float(np.nanmean(self.baseline_m)), KL_ROUNDING)


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
        The interval and the comparison.
    """
    generator = np.random.default_rng(seed)
    top_Sn = generator.integers(len(own.top_n), size=(DRAWS, len(own.top_n)))
    baseline_Sm = generator.integers(len(own.baseline_m), size=(DRAWS, len(own.baseline_m)))

    def ratios(measured: Measured) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            top_S = _means(measured.top_n, top_Sn)
            return top_S / np.maximum(_means(measured.baseline_m, baseline_Sm), KL_ROUNDING)

    own_S = ratios(own)
    threshold_S = np.max([np.ones(DRAWS), *(ratios(control) for control in controls)], axis=0)
    low, high = np.nanquantile(own_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Confidence(float(low), float(high), bool(np.mean(own_S > threshold_S) >= LEVEL))


def rank_correlation(coefficients_n: NDArray[np.floating], kl_n: NDArray[np.floating]) -> float | None:
    """Compute Spearman's rank correlation over the examples that have both values.

    Return None if there are fewer than two such examples, or if one of the variables is constant.
    """
    known = ~(np.isnan(coefficients_n) | np.isnan(kl_n))
    x_n, y_n = coefficients_n[known], kl_n[known]
    if len(x_n) < 2 or np.ptp(x_n) == 0 or (y_n == y_n[0]).all():
        return None
    return float(stats.spearmanr(x_n, y_n).statistic)


def _means(values: NDArray[np.float64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute the mean of each draw over the values that are not NaN; NaN if all values of a draw are NaN."""
    known = ~np.isnan(values)
    counts = known[drawn].sum(axis=1)
    sums = np.where(known, values, 0.0)[drawn].sum(axis=1)
    result: NDArray[np.float64] = np.divide(sums, counts, out=np.full(len(drawn), np.nan), where=counts > 0)
    return result
