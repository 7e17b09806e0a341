"""The criterion of a joint ablation, and its summary."""

from __future__ import annotations

from typing import Any

import pytest
from npeff.statistics.joint_ablation import joint_ablations, still_there, summary


@pytest.mark.parametrize(
    ("kl_top", "ratio", "unablated", "expected"),
    [
        (0.1, 5.0, 10.0, True),
        (0.1, 4.9, 10.0, False),
        (0.1, 1.0, 1.5, False),
        (0.1, 1.1, 1.5, True),
        (1e-8, 5.0, 5.0, False),
        (0.1, None, 5.0, None),
        (0.1, 5.0, None, None),
        (None, None, 5.0, None),
    ],
)
def test_an_effect_is_still_there_with_half_of_its_ratio_and_above_one(kl_top, ratio, unablated, expected) -> None:
    assert still_there(kl_top, ratio, unablated) is expected


def row(component: int, draw: int | None, ratio: float | None, removed: float = 0.2) -> dict[str, Any]:
    return {
        "component": component,
        "draw": draw,
        "adversarial": draw is None,
        "kl_ratio_matched": ratio,
        "kl_ratio_unablated": 10.0,
        "kl_removed_top": removed,
        "kl_removed_matched": 2 * removed,
        "still_there": still_there(0.1, ratio, 10.0),
        "examples_passed": 50,
    }


def test_components_are_summarized_over_their_random_draws_and_medians_are_over_those_that_are_matched() -> None:
    rows = [row(3, 0, 8.0, 0.1), row(3, 1, 2.0, 0.3), row(3, 2, 9.0, 0.2), row(3, None, 7.0)]
    rows += [row(0, 0, 6.0), row(0, 1, 7.0), row(0, 2, None), row(0, None, 0.5), row(5, 0, 20.0)]
    none, three, five = joint_ablations(rows)
    assert (none.component, three.component, five.component) == (0, 3, 5)
    assert (three.n_draws, three.share_still_there, three.median_kl_ratio) == (3, pytest.approx(2 / 3), 8.0)
    assert (three.worst_kl_ratio, three.worst_still_there, three.adversarial_still_there) == (2.0, False, True)
    assert (three.kl_removed_top, three.kl_removed_matched) == (0.2, 0.4)
    assert (none.n_draws, none.share_still_there, none.adversarial_still_there) == (3, 1.0, False)
    assert (five.adversarial_kl_ratio, five.adversarial_still_there) == (None, None)
    found = summary([none, three, five], counted={0, 3})
    assert (found["n"], found["n_left_out"], found["n_draws"]) == (2, 1, 3)
    assert found["examples_passed_per_component"] == 150
    assert found["median_share_still_there"] == pytest.approx(5 / 6)
    assert found["share_worst_still_there"] == found["share_adversarial_still_there"] == 0.5
    assert found["median_worst_kl_ratio"] == 4.0
    assert found["median_adversarial_kl_ratio"] == 3.75
    assert summary([five], {5})["share_adversarial_still_there"] is None
    assert summary([], set())["n"] == 0


def test_a_component_whose_ratio_is_never_known_is_left_out() -> None:
    (unknown,) = joint_ablations([row(1, 0, None), row(1, 1, None)])
    assert (unknown.n_draws, unknown.share_still_there, unknown.worst_still_there) == (2, None, None)
    assert summary([unknown], {1})["n"] == 0
