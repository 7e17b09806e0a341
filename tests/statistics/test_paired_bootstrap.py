"""Intervals of means and of paired differences: how often they hold, and what belongs together."""

from __future__ import annotations

import numpy as np
import pytest
from npeff.statistics.paired_bootstrap import mean_interval, paired_difference


def test_an_interval_holds_the_true_difference_about_as_often_as_it_says() -> None:
    rng, trials = np.random.default_rng(0), 200
    held = 0
    for seed in range(trials):
        shared_N = rng.exponential(size=60)
        found = paired_difference(shared_N + rng.normal(0.3, 0.5, 60), shared_N, seed=seed)
        held += found.low <= 0.3 <= found.high
    assert 0.89 <= held / trials <= 0.99  # the standard error is 0.015


def test_pairs_make_the_interval_narrower_than_that_of_a_mean() -> None:
    rng = np.random.default_rng(1)
    shared_N = 10 * rng.normal(size=50)
    first_N, second_N = shared_N + 1 + 0.1 * rng.normal(size=50), shared_N
    found = paired_difference(first_N, second_N)
    assert found.mean == pytest.approx(1, abs=0.1)
    assert 0.9 < found.low < found.high < 1.1
    assert mean_interval(first_N).high - mean_interval(first_N).low > 2
    assert paired_difference(first_N, second_N, seed=3) == paired_difference(first_N, second_N, seed=3)


def test_copies_in_one_group_do_not_make_the_interval_narrower() -> None:
    values_N = np.random.default_rng(2).normal(size=40)
    copies_N, groups_N = np.repeat(values_N, 5), np.repeat(np.arange(40), 5)
    once, copied, together = mean_interval(values_N), mean_interval(copies_N), mean_interval(copies_N, groups_N)
    assert (together.low, together.high) == pytest.approx((once.low, once.high))
    assert copied.high - copied.low < 0.6 * (once.high - once.low)


def test_missing_values_are_left_out_in_pairs() -> None:
    first_N, second_N = np.array([1.0, 2, np.nan, 4]), np.array([0.0, np.nan, 0, 3])
    found = paired_difference(first_N, second_N, np.array(["a", "b", "c", "d"]))
    assert (found.mean, found.low, found.high, found.n) == (1, 1, 1, 2)


def test_too_few_values_have_no_interval() -> None:
    none, one = mean_interval(np.array([np.nan])), mean_interval(np.array([3.0]))
    assert np.isnan([none.mean, none.low, one.low, one.high]).all()
    assert (none.n, one.mean, one.n) == (0, 3, 1)
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(np.zeros(2), np.zeros(3))
