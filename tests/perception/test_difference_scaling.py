"""Difference scaling: the maximum of its likelihood, recovery of a known scale, refusals; the area matching score."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from npeff.perception.difference_scaling import DifferenceScaling, answer_probability, triplets
from npeff.perception.matching import area_matching_score
from scipy import optimize, special

LEVELS = np.linspace(0, 1, 13)
LOGARITHM = np.log1p(4 * LEVELS) / math.log(5)


def answers(psi: np.ndarray, sigma: float, repetitions: int, seed: int) -> np.ndarray:
    """The rows of a simulated observer."""
    shown = np.repeat(triplets(len(psi)), repetitions, axis=0)
    drawn = np.random.default_rng(seed).random(len(shown)) < answer_probability(psi, sigma, shown)
    return np.column_stack([shown, drawn])


def log_likelihood(slopes: np.ndarray, rows: np.ndarray) -> float:
    """By its definition, trial by trial."""
    psi = np.concatenate([[0], slopes])
    decisions = psi[rows[:, 2]] - 2 * psi[rows[:, 1]] + psi[rows[:, 0]]
    return float(special.log_ndtr(np.where(rows[:, 3] == 1, decisions, -decisions)).sum())


def test_there_are_81_triplets_of_13_levels() -> None:
    shown = triplets()
    assert len(shown) == len(np.unique(shown, axis=0)) == 81
    assert (np.diff(shown, axis=1) >= 1).all()
    assert (np.diff(shown, axis=1) <= 3).all()
    assert shown.max() == 12


def test_the_fit_is_the_maximum_of_the_likelihood() -> None:
    rows = answers(LOGARITHM[::2], 0.15, 30, 0)
    fitted = DifferenceScaling().fit(rows)
    slopes = fitted.psi_[1:] / fitted.sigma_
    assert fitted.log_likelihood_ == pytest.approx(log_likelihood(slopes, rows), rel=1e-12)
    found = optimize.minimize(
        lambda each: -log_likelihood(each, rows), slopes * 0.8, method="BFGS", options={"gtol": 1e-7}
    )
    np.testing.assert_allclose(fitted.psi_[1:] / fitted.sigma_, found.x, rtol=1e-5)
    assert (fitted.psi_[0], fitted.psi_[-1]) == (0, 1)


def test_the_order_of_the_trials_does_not_matter() -> None:
    rows = answers(LOGARITHM, 0.1, 5, 1)
    fitted, again = DifferenceScaling().fit(rows), DifferenceScaling().fit(rows[::-1])
    np.testing.assert_array_equal(fitted.psi_, again.psi_)
    np.testing.assert_array_equal(fitted.intervals(n_draws=20).low_n, again.intervals(n_draws=20).low_n)


def test_a_known_scale_is_recovered() -> None:
    errors, sigmas = [], []
    for seed in range(10):
        fitted = DifferenceScaling().fit(answers(LOGARITHM, 0.1, 25, seed))
        errors.append(np.abs(fitted.psi_ - LOGARITHM).max())
        sigmas.append(fitted.sigma_)
    assert np.mean(errors) <= 0.03
    assert np.mean(sigmas) == pytest.approx(0.1, abs=0.01)


def test_intervals_are_around_the_estimate_and_shrink_with_more_answers() -> None:
    widths = []
    for repetitions in (5, 80):
        fitted = DifferenceScaling().fit(answers(LOGARITHM, 0.1, repetitions, 3))
        found = fitted.intervals(0.95, n_draws=200)
        assert (found.low_n <= fitted.psi_).all()
        assert (found.high_n >= fitted.psi_).all()
        assert found.sigma[0] <= fitted.sigma_ <= found.sigma[1]
        assert (found.low_n[0], found.high_n[0], found.low_n[-1], found.high_n[-1]) == (0, 0, 1, 1)
        assert found.n_left_out == 0
        widths.append((found.high_n - found.low_n)[1:-1].mean())
    assert widths[1] < widths[0] / 3  # a quarter, for 16 times as many answers


ROWS = answers(LOGARITHM[::2], 0.15, 10, 4)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([[0, 1, 2, 1], [2, 1, 3, 0]], "row 1 is (2, 1, 3, 0): it must be levels i < j < k, and the answer 0 or 1"),
        ([[0, 1, 2, 2]], "row 0 is (0, 1, 2, 2)"),
        ([[0, 1, 2.5, 1]], "row 0 is (0, 1, 2.5, 1)"),
        ([[0, 1, np.nan, 1]], "row 0 is (0, 1, nan, 1)"),
        ([[-1, 1, 2, 1]], "row 0 is (-1, 1, 2, 1)"),
        (np.zeros((0, 4)), "one row (i, j, k, answer) per trial"),
        ([[0, 1, 2]], "one row (i, j, k, answer) per trial"),
        (ROWS[(ROWS[:, :3] != 3).all(1)], "level 3 is never shown"),
        (ROWS[np.ptp(np.diff(ROWS[:, :3], axis=1), axis=1) == 0], "do not determine the scale"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(rows: object, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        DifferenceScaling().fit(rows)  # type: ignore[arg-type]


def test_answers_without_errors_are_refused() -> None:
    shown = np.repeat(triplets(7), 5, axis=0)
    certain = answer_probability(np.linspace(0, 1, 7) ** 2, 1e-9, shown) > 0.5
    with pytest.raises(ValueError, match="the answers have no errors"):
        DifferenceScaling().fit(np.column_stack([shown, certain]))


def test_intervals_without_an_estimate_in_any_draw_are_refused() -> None:
    shown = np.repeat(triplets(7), 5, axis=0)
    certain = answer_probability(np.linspace(0, 1, 7) ** 2, 1e-9, shown) > 0.5
    fitted = DifferenceScaling().fit(ROWS)
    fitted._counts_T2 = np.column_stack([~certain.reshape(-1, 5).all(1), certain.reshape(-1, 5).all(1)]).astype(float)
    with pytest.raises(ValueError, match="no bootstrap draw has an estimate"):
        fitted.intervals(n_draws=20)


def test_more_levels_than_stated_are_refused() -> None:
    with pytest.raises(ValueError, match="level 6 is shown, but n_levels is 5"):
        DifferenceScaling(5).fit(ROWS)


def test_the_area_matching_score() -> None:
    x = np.linspace(0, 1, 9)
    measured = x**2
    assert area_matching_score(x, measured, measured) == pytest.approx(1)
    assert area_matching_score(x, measured, x) == pytest.approx(0)
    assert area_matching_score(x, measured, 2 * x - measured) == pytest.approx(-1)
    assert area_matching_score(x, measured, (x + measured) / 2) == pytest.approx(0.5)
    assert area_matching_score(x, x, measured) is None
    for bad in (measured[:-1], np.full(9, np.nan)):
        with pytest.raises(ValueError, match="must be"):
            area_matching_score(x, measured, bad)
