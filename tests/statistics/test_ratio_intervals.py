"""Intervals of KL ratios: how often they hold, and when a ratio is surely above its controls."""

from __future__ import annotations

import numpy as np
import pytest
from npeff.statistics.ratio_intervals import DRAWS, Measured, confidence, median_interval, rank_correlation
from scipy import stats


def drawn(rng: np.random.Generator, top: float, baseline: float = 1.0) -> Measured:
    """KLs of 32 and 200 examples with these means, as scattered as KLs are."""
    return Measured(top * rng.exponential(size=32), baseline * rng.exponential(size=200))


def test_an_interval_holds_the_true_ratio_about_as_often_as_it_says() -> None:
    rng, trials = np.random.default_rng(0), 400
    found = [confidence(drawn(rng, 3.0), [], seed) for seed in range(trials)]
    covered = np.mean([one.low <= 3.0 <= one.high for one in found])
    # percentile intervals of a skewed mean of 32 fall short of 95% by a few points; the standard error here is 1.3
    assert 0.88 <= covered <= 0.98
    assert all(one.low < one.high for one in found)


def test_the_interval_of_a_median_holds_it_about_as_often_as_it_says() -> None:
    rng, trials = np.random.default_rng(4), 400
    found = [median_interval(rng.lognormal(size=25), seed) for seed in range(trials)]
    assert 0.9 <= np.mean([low <= 1.0 <= high for low, high in found]) <= 0.99
    low, high = median_interval(np.array([1.0, 2.0, np.inf]))
    assert (low, high) == (1.0, np.inf)
    assert median_interval(np.array([3.0])) == (3.0, 3.0)


def test_a_ratio_that_is_no_larger_than_a_controls_is_seldom_surely_above_it() -> None:
    rng, trials = np.random.default_rng(1), 400
    sure = [confidence(drawn(rng, 3.0), [drawn(rng, 3.0)], seed).above_controls for seed in range(trials)]
    assert np.mean(sure) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials) + 0.02


@pytest.mark.parametrize(
    ("own", "controls", "sure"), [(5.0, [1.0, 1.5], True), (5.0, [1.0, 9.0], False), (0.5, [0.01], False)]
)
def test_it_must_be_above_one_and_every_control(own: float, controls: list[float], sure: bool) -> None:
    rng = np.random.default_rng(2)
    assert confidence(drawn(rng, own), [drawn(rng, control) for control in controls], 0).above_controls is sure


@pytest.mark.parametrize("place", range(3))
def test_every_control_is_drawn_again_with_the_examples(place: int) -> None:
    """All values of one control are those of two examples: its ratio is 2, and 3 or more in a third of the draws."""
    own, steady = (Measured(np.full(32, ratio), np.ones(50)) for ratio in (3.0, 2.0))
    uneven = Measured(np.append(np.zeros(30), [32.0, 32.0]), np.ones(50))
    assert uneven.ratio == steady.ratio
    assert confidence(own, [steady] * 3, 0).above_controls
    controls = [uneven if number == place else steady for number in range(3)]
    assert not confidence(own, controls, 0).above_controls


def test_examples_without_a_kl_are_left_out_and_infinite_ones_are_not() -> None:
    rng = np.random.default_rng(3)
    plain = drawn(rng, 5.0)
    padded = Measured(np.append(plain.top_n, np.nan), np.append(plain.baseline_m, [np.nan] * 5))
    assert padded.ratio == pytest.approx(plain.ratio)
    found = confidence(padded, [], 0)
    assert np.isfinite([found.low, found.high]).all()
    infinite = confidence(Measured(np.append(plain.top_n, np.inf), plain.baseline_m), [], 0)
    assert np.isfinite(infinite.low)
    assert infinite.high == np.inf
    still = confidence(Measured(plain.top_n, np.zeros(200)), [plain], 0)
    assert still.above_controls
    assert Measured(plain.top_n, np.zeros(200)).ratio > 1e9


def test_the_same_seed_draws_the_same() -> None:
    own = drawn(np.random.default_rng(4), 2.0)
    assert confidence(own, [], 1) == confidence(own, [], 1)
    assert confidence(own, [], 1) != confidence(own, [], 2)


def test_the_rank_correlation_is_spearmans_with_ties() -> None:
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 5, 50).astype(float), rng.random(50)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    x[3], y[7] = np.nan, np.nan
    kept = np.isfinite(x) & np.isfinite(y)
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x[kept], y[kept]).statistic)
    assert rank_correlation(np.zeros(50), y) is None
    assert rank_correlation(x[:1], y[:1]) is None


def test_a_baseline_example_that_counts_several_times_is_drawn_as_one() -> None:
    """Against a bootstrap that repeats the values of the drawn examples."""
    rng = np.random.default_rng(6)
    counts = np.array([1, 5, 2, 7, 1])
    own = Measured(rng.exponential(size=9), rng.exponential(size=5), counts)
    control = Measured(rng.exponential(size=9), rng.exponential(size=5), counts)
    repeated = Measured(own.top_n, np.repeat(own.baseline_m, counts))
    assert own.ratio == pytest.approx(repeated.ratio)
    generator = np.random.default_rng(3)
    tops, clusters = generator.integers(9, size=(DRAWS, 9)), generator.integers(5, size=(DRAWS, 5))

    def ratios(measured: Measured) -> list[float]:
        return [
            float(
                measured.top_n[top].mean()
                / np.concatenate([[measured.baseline_m[i]] * counts[i] for i in drawn]).mean()
            )
            for top, drawn in zip(tops, clusters, strict=True)
        ]

    found, expected = confidence(own, [control], 3), ratios(own)
    ends = np.quantile(expected, [(1 - 0.95) / 2, (1 + 0.95) / 2], method="inverted_cdf")
    np.testing.assert_allclose([found.low, found.high], ends)
    above = np.mean([mine > max(1, other) for mine, other in zip(expected, ratios(control), strict=True)])
    assert found.above_controls is bool(above >= 0.95)
    narrow = confidence(repeated, [], 3)
    assert found.high - found.low > narrow.high - narrow.low, "five examples tell less than sixteen"


def test_the_auc_is_the_share_of_pairs_in_which_the_top_example_is_larger() -> None:
    rng = np.random.default_rng(7)
    top, baseline, counts = rng.integers(0, 5, 30) / 1.0, rng.integers(0, 4, 20) / 1.0, rng.integers(1, 4, 20)
    top[2], baseline[4] = np.nan, np.nan
    pairs = [
        float(one > other) + 0.5 * float(one == other)
        for one in top[np.isfinite(top)]
        for other in np.repeat(baseline, counts)
        if np.isfinite(other)
    ]
    assert Measured(top, baseline, counts).auc == pytest.approx(np.mean(pairs))
    assert Measured(np.array([np.inf]), np.array([1.0, np.inf])).auc == 0.75
    assert np.isnan(Measured(np.array([1.0]), np.array([np.nan])).auc)


def test_a_group_without_values_has_no_ratio_and_is_above_nothing() -> None:
    empty = Measured(np.ones(3), np.empty(0), np.empty(0, np.int64))
    found = confidence(empty, [empty], 0)
    assert np.isnan([empty.ratio, found.low, found.high]).all()
    assert not found.above_controls
