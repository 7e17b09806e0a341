"""The statistics of a repair against scipy, by hand and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from npeff.statistics.mcnemar import McNemar, mcnemar
from npeff.verification import Edit, RepairCandidate, choose_step, joint_steps, over_represented
from numpy.typing import NDArray
from scipy import stats

EVERYONE = np.ones(400, dtype=bool)


def drawn_tops(rng: np.random.Generator, n_components: int) -> list[NDArray[np.int64]]:
    return [rng.permutation(400)[: rng.integers(1, 60)] for _ in range(n_components)]


def test_p_values_and_odds_ratios_are_those_of_fishers_exact_test() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(400) < 0.15
    tops = [*drawn_tops(rng, 30), np.flatnonzero(wrong)[:20], np.flatnonzero(wrong), np.flatnonzero(~wrong)[:9]]
    found = over_represented(tops, wrong, EVERYONE)
    for k, top in enumerate(tops):
        inside = np.isin(np.arange(400), top)
        table = [[int((a & b).sum()) for b in (wrong, ~wrong)] for a in (inside, ~inside)]
        expected = stats.fisher_exact(table, alternative="greater")
        np.testing.assert_allclose(found.p_values_K[k], expected.pvalue, rtol=1e-10)
        np.testing.assert_allclose(found.odds_ratios_K[k], expected.statistic)
    assert found.n_top_K.tolist() == [len(top) for top in tops]
    assert found.n_wrong_K.tolist() == [int(wrong[top].sum()) for top in tops]
    np.testing.assert_allclose(found.q_values_K, stats.false_discovery_control(found.p_values_K))


def test_a_small_table_by_hand() -> None:
    """Two of three top examples are wrong, of 3 wrong ones in 10: (3·7 + 1)/120."""
    wrong = np.arange(10) < 3
    found = over_represented([np.array([0, 1, 9])], wrong, EVERYONE[:10])
    assert found.p_values_K[0] == pytest.approx(22 / 120)
    assert found.odds_ratios_K[0] == pytest.approx((2 * 6) / (1 * 1))
    assert found.q_values_K[0] == found.p_values_K[0]


def test_only_marked_examples_are_compared() -> None:
    rng = np.random.default_rng(1)
    wrong, among = rng.random(400) < 0.3, rng.random(400) < 0.5
    places = np.flatnonzero(among)
    top = np.array([3, 17, 40, 41])
    found = over_represented([places[top]], wrong, among)
    part = over_represented([top], wrong[places], EVERYONE[: len(places)])
    assert found.p_values_K == part.p_values_K
    assert found.odds_ratios_K == part.odds_ratios_K


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_where_all_or_none_are_wrong_or_there_is_no_top_nothing_is_over_represented(share: float) -> None:
    wrong = np.full(400, bool(share))
    found = over_represented([np.array([], dtype=np.int64), np.arange(7)], wrong, EVERYONE)
    assert found.p_values_K.tolist() == [1.0, 1.0]
    assert np.isnan(found.odds_ratios_K).all()
    assert over_represented([], wrong, EVERYONE).q_values_K.shape == (0,)


def test_top_examples_that_are_not_marked_or_there_twice_are_refused() -> None:
    for top in (np.array([0, 5]), np.array([1, 1])):
        with pytest.raises(ValueError, match="must be distinct"):
            over_represented([top], EVERYONE, np.arange(400) < 3)


def test_tops_drawn_at_random_are_called_at_most_as_often_as_said() -> None:
    rng = np.random.default_rng(2)
    wrong = rng.random(400) < 0.2
    p = over_represented(drawn_tops(rng, 4000), wrong, EVERYONE).p_values_K
    for level in (0.01, 0.05, 0.2):
        assert (p <= level).mean() <= level + 3 * math.sqrt(level * (1 - level) / 4000)


def changed(n: int, broken: int, mended: int) -> McNemar:
    before = np.arange(n) < broken + (n - broken - mended) // 2
    after = before.copy()
    after[:broken] = False
    after[n - mended :] = True
    return mcnemar(before, after)


@pytest.mark.parametrize(
    ("broken", "mended", "p_value"), [(0, 0, 1.0), (0, 1, 1.0), (3, 3, 1.0), (1, 9, 22 / 1024), (2, 0, 0.5)]
)
def test_mcnemars_p_value_is_exact(broken: int, mended: int, p_value: float) -> None:
    found = changed(2000, broken, mended)
    assert (found.n, found.broken, found.mended) == (2000, broken, mended)
    assert found.p_value == pytest.approx(p_value, rel=1e-10)
    assert found.change == (mended - broken) / 2000


def test_the_interval_is_walds_with_half_an_example_in_each_cell() -> None:
    found = changed(100, 4, 15)
    n, b, c = 102, 4.5, 15.5
    p_b, p_c = b / n, c / n
    variance = (p_b + p_c - (p_c - p_b) ** 2) / n
    ends = [p_c - p_b + z * math.sqrt(variance) for z in stats.norm.ppf([0.025, 0.975])]
    assert [found.low, found.high] == pytest.approx(ends)
    same, reverse = changed(100, 0, 0), changed(100, 15, 4)
    assert same.low == -same.high < 0
    assert (reverse.low, reverse.high) == pytest.approx((-found.high, -found.low))
    assert changed(1, 0, 1).high == 1


@pytest.mark.parametrize(
    ("n", "p_broken", "p_mended"),
    [(50, 0.1, 0.2), (50, 0.02, 0.05), (200, 0.01, 0.03), (200, 0.3, 0.3), (1000, 0.005, 0.02)],
)
def test_the_interval_holds_the_change_in_95_percent_of_samples(n: int, p_broken: float, p_mended: float) -> None:
    """20,000 samples: the standard error of the share is 0.0015; the interval is known to err on the safe side where
    few examples change."""
    samples = np.random.default_rng(n).multinomial(n, [p_broken, p_mended, 1 - p_broken - p_mended], 20_000)
    kinds, counts = np.unique(samples[:, :2], axis=0, return_counts=True)
    intervals = [changed(n, int(broken), int(mended)) for broken, mended in kinds]
    holds = np.array([interval.low <= p_mended - p_broken <= interval.high for interval in intervals])
    share = counts[holds].sum() / counts.sum()
    assert 0.94 <= share <= 0.99


def test_mcnemar_needs_the_same_examples_before_and_after() -> None:
    for before, after in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="same examples"):
            mcnemar(np.array(before, dtype=bool), np.array(after, dtype=bool))


BEFORE = np.arange(100) >= 20
"""The first 20 examples are wrong; of these a component has the first ten, or fewer, in its top."""


def candidate(step: float, mended: int, broken: int, component: int = 0, sign: int = 1) -> RepairCandidate:
    after = BEFORE.copy()
    after[:mended] = True
    after[50 : 50 + broken] = False
    return RepairCandidate((Edit(component, sign * step),), np.arange(100) < 10, after)


def test_the_step_that_mends_most_without_harm_is_chosen() -> None:
    weak, good, harmful = candidate(0.1, 2, 0), candidate(0.2, 6, 1), candidate(0.4, 10, 2)
    assert choose_step([weak, good, harmful], BEFORE, BEFORE, 0.01) is weak
    assert choose_step([weak, good, harmful], BEFORE, BEFORE, 1 / 80) is good
    assert choose_step([weak, good, harmful], BEFORE, BEFORE, 0.03) is harmful


def test_examples_mended_elsewhere_count_but_do_not_make_up_for_harm() -> None:
    after = BEFORE.copy()
    after[:1] = after[10:15] = True
    after[50:52] = False
    elsewhere = RepairCandidate((Edit(1, 0.5),), np.arange(100) < 10, after)
    mending = candidate(0.1, 3, 0)
    assert choose_step([mending, elsewhere], BEFORE, BEFORE, 2 / 80) is elsewhere
    assert choose_step([mending, elsewhere], BEFORE, BEFORE, 1 / 80) is mending


def test_harm_is_that_of_all_edits_together() -> None:
    edited = BEFORE.copy()
    edited[:5], edited[60:62] = True, False
    further = edited.copy()
    further[5:10], further[62] = True, False
    second = RepairCandidate((Edit(1, 0.5),), np.arange(100) < 10, further)
    assert choose_step([second], edited, BEFORE, 2 / 80) is None
    assert choose_step([second], edited, BEFORE, 3 / 80) is second
    back = further.copy()
    back[60:62] = True
    assert (
        choose_step([RepairCandidate((Edit(1, 0.5),), np.arange(100) < 10, back)], edited, BEFORE, 1 / 80) is not None
    )


def test_of_equals_the_smaller_step_is_taken() -> None:
    larger, smaller = candidate(0.4, 5, 0), candidate(0.1, 5, 0, component=7, sign=-1)
    assert choose_step([larger, smaller], BEFORE, BEFORE, 0.0) is smaller
    negative, positive = candidate(0.1, 5, 0, sign=-1), candidate(0.1, 5, 0)
    assert choose_step([negative, positive], BEFORE, BEFORE, 0.0) is positive


def test_where_nothing_helps_nothing_is_chosen() -> None:
    assert choose_step([], BEFORE, BEFORE, 0.1) is None
    assert choose_step([candidate(0.1, 0, 0), candidate(0.2, 3, 3), candidate(0.3, 1, 8)], BEFORE, BEFORE, 0.5) is None
    only_elsewhere = BEFORE.copy()
    only_elsewhere[15] = True
    beside = RepairCandidate((Edit(0, 0.1),), np.arange(100) < 10, only_elsewhere)
    assert choose_step([beside], BEFORE, BEFORE, 0.5) is None, "what it was chosen for stays wrong"


def test_a_candidate_of_other_examples_is_refused() -> None:
    with pytest.raises(ValueError, match="number of examples"):
        choose_step([candidate(0.1, 1, 0)], BEFORE[:99], BEFORE[:99], 0.0)


def test_steps_taken_together_are_the_least_loss_and_what_adds_nothing_stays() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 5))
    root[:, 4] = 0.0  # nothing depends on the last
    best, unit = rng.normal(size=5), 0.05
    calls = []

    def loss_and_gradient(steps_J: np.ndarray) -> tuple[float, np.ndarray]:
        calls.append(steps_J.copy())
        residual = root @ ((steps_J - best) / unit)
        return float(residual @ residual), 2 * root.T @ residual / unit

    found = joint_steps(loss_and_gradient, np.full(5, 0.3 * unit), unit, 200)
    ridge = 1e-6 * np.eye(5)
    expected = np.linalg.solve(root.T @ root + ridge, root.T @ root @ (best / unit)) * unit
    np.testing.assert_allclose(found[:4], expected[:4], rtol=0.05)
    assert found[4] == pytest.approx(0.3 * unit, rel=1e-3)
    np.testing.assert_array_equal(calls[0], np.full(5, 0.3) * unit, "it goes on from where it is")
    calls.clear()
    joint_steps(loss_and_gradient, np.zeros(5), unit, 5)
    assert len(calls) <= 5 + 20
