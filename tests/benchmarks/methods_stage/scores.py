"""Medians and shares over components, with 95% intervals.

For medians, the components of each run are resampled with replacement (percentile bootstrap). For shares, the intervals
are those of Clopper and Pearson, because the bootstrap of a share of 0 or 1 has no width. An interval describes the
variation over components, with the same model, examples and splits.

Legend: n components of a run, S draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

DRAWS = 10_000

Row = dict[str, Any]
"""A row of the table `verification`."""


@dataclass(frozen=True)
class Estimate:
    """A statistic with its central 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def tested(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of held-out examples and the informative sign: at most one row per component."""
    return [row for row in rows if row["examples"] == "held_out" and row["informative"]]


def counted(rows: Sequence[Row]) -> list[Row]:
    """Return those of the `tested` rows that count as matched and have a ratio."""
    return [row for row in tested(rows) if row["matched"] and row["kl_ratio_matched"] is not None]


def summary(runs: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """Summarize the components of one or several runs together.

    Medians and shares are over the components that count as matched, except ``all components``, the median matched
    ratio of all that have one.
    """
    matched = [found for rows in runs if (found := counted(rows))]
    facts: dict[str, Any] = {"components": sum(len(tested(rows)) for rows in runs), "matched": sum(map(len, matched))}
    if not matched:
        return facts
    ratios = {"matched ratio": "kl_ratio_matched", "by trace": "kl_ratio_trace", "raw ratio": "kl_ratio"}
    for name, column in ratios.items():
        facts[name] = median([_column(rows, column) for rows in matched])
    known = [[row for row in tested(rows) if row["kl_ratio_matched"] is not None] for rows in runs]
    facts["all components"] = median([_column(rows, "kl_ratio_matched") for rows in known if rows])
    every = [row for rows in matched for row in rows]
    for bar in (1, 2):
        facts[f"above {bar}"] = share([row["kl_ratio_matched"] > bar for row in every])
    facts["above controls"] = share([row["above_controls"] for row in every])
    return facts


def quotient(runs: Sequence[Sequence[Row]], others: Sequence[Sequence[Row]]) -> Estimate | None:
    """Return the median matched ratio of some runs divided by that of others. None if one of them has none."""
    samples = []
    for seed, group in enumerate((runs, others), 1):
        matched = [_column(found, "kl_ratio_matched") for rows in group if (found := counted(rows))]
        if not matched:
            return None
        samples.append((float(np.median(np.concatenate(matched))), _medians(matched, seed)))
    (own, own_S), (other, other_S) = samples
    return Estimate(own / other, *_central(own_S / other_S))


def median(groups: Sequence[NDArray[np.float64]], seed: int = 0) -> Estimate:
    """Return the median of the values of all groups."""
    return Estimate(float(np.median(np.concatenate(groups))), *_central(_medians(groups, seed)))


def share(decisions: Sequence[bool]) -> Estimate:
    """Return the share of true decisions."""
    found = binomtest(sum(decisions), len(decisions))
    interval = found.proportion_ci(method="exact")
    return Estimate(found.statistic, interval.low, interval.high)


def _medians(groups: Sequence[NDArray[np.float64]], seed: int) -> NDArray[np.float64]:
    """Return the median of each draw. Each group is resampled by itself."""
    generator = np.random.default_rng(seed)
    drawn = [group[generator.integers(len(group), size=(DRAWS, len(group)))] for group in groups]
    found_S: NDArray[np.float64] = np.median(np.concatenate(drawn, axis=1), axis=1)
    return found_S


def _central(draws_S: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(draws_S, [0.025, 0.975])
    return float(low), float(high)


def _column(rows: Sequence[Row], name: str) -> NDArray[np.float64]:
    return np.array([row[name] for row in rows], dtype=np.float64)
