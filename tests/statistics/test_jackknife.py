"""Intervals of the jackknife over groups, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from npeff.statistics.jackknife import jackknife_interval
from scipy import stats


def test_the_interval_of_a_mean_over_equal_groups_is_that_of_student() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 8)
    without = [np.delete(values, group).mean() for group in range(8)]
    expected = stats.t.interval(0.95, 7, values.mean(), stats.sem(values))
    assert jackknife_interval(values.mean(), without, [5] * 8) == pytest.approx(expected, rel=1e-12)


def test_equal_groups_have_the_usual_variance_for_any_statistic() -> None:
    groups = np.random.default_rng(1).exponential(size=(6, 20))
    without = np.array([np.log(np.delete(groups, group, axis=0).mean()) for group in range(6)])
    low, high = jackknife_interval(np.log(groups.mean()), without, [20] * 6) or (0, 0)
    expected = 2 * stats.t.ppf(0.975, 5) * np.sqrt(5 / 6 * np.square(without - without.mean()).sum())
    assert high - low == pytest.approx(expected, rel=1e-12)


def test_groups_of_unequal_sizes_cover_the_mean() -> None:
    rng, sizes = np.random.default_rng(2), np.array([40, 20, 20, 20, 20, 20, 20, 30])
    covered = 0
    for _ in range(400):
        sums = np.array([rng.normal(size=size).sum() for size in sizes])
        without = (sums.sum() - sums) / (sizes.sum() - sizes)
        low, high = jackknife_interval(sums.sum() / sizes.sum(), without, sizes) or (0, 0)
        covered += low <= 0 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_one_group_has_no_interval() -> None:
    assert jackknife_interval(1.0, [], []) is None
    assert jackknife_interval(1.0, [1.0], [5]) is None
