"""How sure a KL ratio is, from the examples that it was measured on.

A ratio of two means over a few dozen examples is uncertain. Here both groups are drawn anew with replacement, many
times (B. Efron & R. Tibshirani, An introduction to the bootstrap, 1993, chapter 13: percentile intervals), and what
stays is what an interval and a comparison are read from. All directions are compared on the same draws, because they
were measured on the same examples. The step is kept: that it was chosen on the top examples is not among what varies.

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
"""Mean KL (nats) that rounding of float32 logits can cause; a baseline below it counts as this much."""


@dataclass(frozen=True)
class Measured:
    """One number per example of either group: KL divergences, or Fisher norms. NaN where an example has none."""

    top_n: NDArray[np.float64]
    baseline_m: NDArray[np.float64]

    @property
    def ratio(self) -> float:
        """Mean over the top examples over that of the baseline."""
        return float(np.nanmean(self.top_n)) / max(float(np.nanmean(self.baseline_m)), KL_ROUNDING)


@dataclass(frozen=True)
class Confidence:
    """Of a KL ratio."""

    low: float
    high: float
    """Ends of the central 95% interval."""
    above_controls: bool
    """Whether in at least 95% of the draws it is above 1 and above every control's ratio in the same draw."""


def confidence(own: Measured, controls: Sequence[Measured], seed: int) -> Confidence:
    """Of ``own.ratio``, beside those of its controls on the same examples."""
    generator = np.random.default_rng(seed)
    top_Sn = generator.integers(len(own.top_n), size=(DRAWS, len(own.top_n)))
    baseline_Sm = generator.integers(len(own.baseline_m), size=(DRAWS, len(own.baseline_m)))

    def ratios(measured: Measured) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            top_S = _means(measured.top_n, top_Sn)
            return top_S / np.maximum(_means(measured.baseline_m, baseline_Sm), KL_ROUNDING)

    own_S = ratios(own)
    most_S = np.max([np.ones(DRAWS), *(ratios(control) for control in controls)], axis=0)
    low, high = np.nanquantile(own_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
    return Confidence(float(low), float(high), bool(np.mean(own_S > most_S) >= LEVEL))


def rank_correlation(coefficients_n: NDArray[np.floating], kl_n: NDArray[np.floating]) -> float | None:
    """Spearman's, of the examples that have both; None where there are fewer than two of them, or all are alike."""
    known = ~(np.isnan(coefficients_n) | np.isnan(kl_n))
    x_n, y_n = coefficients_n[known], kl_n[known]
    if len(x_n) < 2 or np.ptp(x_n) == 0 or (y_n == y_n[0]).all():
        return None
    return float(stats.spearmanr(x_n, y_n).statistic)


def _means(values: NDArray[np.float64], drawn: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of each draw, without the values that are NaN; NaN where all of them are."""
    known = ~np.isnan(values)
    counts = known[drawn].sum(axis=1)
    sums = np.where(known, values, 0.0)[drawn].sum(axis=1)
    return np.divide(sums, counts, out=np.full(len(drawn), np.nan), where=counts > 0)
