from __future__ import annotations

import math
from typing import Any

import pytest
from npeff.statistics.verdict import is_matched, scoreboard, verdicts


def row(
    component: int, ratio: float | None, norms: float | None, random: float | None, other: float | None, **more: Any
) -> dict[str, Any]:
    values = {"component": component, "examples": "held_out", "sign": 1, "kl_ratio": ratio, "above_controls": False}
    return {**values, "fisher_norm_ratio": norms, "random_kl_ratio": random, "other_kl_ratio": other, **more}


def matched(component: int, ratio: float | None, informative: bool = True, **more: Any) -> dict[str, Any]:
    """A row of the present version, whose ratio with a random baseline would give another verdict."""
    return row(component, 100.0, 0.001, 0.5, 0.9, **{
        "informative": informative, "matched": True, "kl_ratio_matched": ratio, "trace_ratio": 1.1,
        "kl_ratio_trace": 20.0, "sign": 1 if informative else -1, **more,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("ratio", "norms", "random", "other", "above"),
    [
        (3.0, 1.0, 2.0, 0.5, True),
        (3.0, 4.0, 2.0, 0.5, False),
        (3.0, 1.0, 4.0, 0.5, False),
        (3.0, 1.0, 2.0, 4.0, False),
        (3.0, 3.0, 1.0, 1.0, False),
        (math.inf, 1.0, 2.0, 0.5, True),
        (math.nan, 1.0, 2.0, 0.5, None),
        (None, 1.0, 2.0, 0.5, None),
        (3.0, math.nan, 2.0, None, True),
        (3.0, None, None, None, None),
    ],
)
def test_a_ratio_must_beat_all_controls(ratio, norms, random, other, above) -> None:
    (verdict,) = verdicts([row(0, ratio, norms, random, other)])
    assert verdict.above_controls is above


@pytest.mark.parametrize(
    ("n_distinct", "trace_ratio", "expected"),
    [(20, 1.0, True), (19, 1.0, False), (50, 0.8, True), (50, 1.25, True), (50, 0.79, False), (50, 1.26, False),
     (50, math.nan, False)],
)  # fmt: skip
def test_a_component_is_matched_by_enough_examples_with_a_near_trace(n_distinct, trace_ratio, expected) -> None:
    assert is_matched(n_distinct, trace_ratio) is expected


def test_the_headline_is_the_matched_ratio_of_the_informative_signs_of_matched_components() -> None:
    rows = [
        matched(0, 2.0),
        matched(0, 50.0, informative=False),
        matched(1, 6.0, sign=-1, above_controls=True),
        matched(2, 1.05),
        matched(3, 400.0, matched=False),
        matched(4, None),
        matched(0, 3.0, examples="fit"),
    ]
    first, second = scoreboard(verdicts(rows))
    assert (first.examples, first.sign, first.n, first.n_not_matched, first.median_kl_ratio) == (
        "held_out",
        None,
        3,
        2,
        2.0,
    )
    assert (first.median_trace_ratio, first.median_raw_ratio, first.median_norm_control) == (20.0, 100.0, 1.1)
    assert (first.share_above_1, first.share_surely_above_controls) == (1.0, pytest.approx(1 / 3))
    assert first.share_above_controls == pytest.approx(2 / 3), "1.05 is below the ratio of the traces"
    assert first.failure is None
    assert (second.examples, second.n) == ("fit", 1)
    (none,) = scoreboard(verdicts([matched(0, 2.0, matched=False)]))
    assert (none.n, none.n_not_matched, none.median_kl_ratio, none.share_above_1, none.failure) == (
        0,
        1,
        None,
        None,
        None,
    )


@pytest.mark.parametrize(
    ("ratio", "more", "why"),
    [
        (0.9, {"trace_ratio": 0.9}, "0.90, is not above 1"),
        (1.05, {}, r"1.05, is not above that of control (a), 1.10"),
        (3.0, {"random_kl_ratio": 3.5}, "3.00, is not above that of control (b), a random direction, 3.50"),
        (3.0, {"other_kl_ratio": 3.0}, "3.00, is not above that of control (c), another component's direction, 3.00"),
        (3.0, {}, None),
    ],
)
def test_a_median_that_is_not_above_its_controls_is_a_failure(ratio, more, why) -> None:
    (score,) = scoreboard(verdicts([matched(0, ratio, **more)]))
    assert score.failure == (None if why is None else f"the median KL ratio on held-out examples, {why}")


def test_the_scoreboard_of_earlier_versions_keeps_signs_and_splits_apart_and_leaves_out_what_was_not_measured() -> None:
    rows = [
        row(0, 1.0, 0.5, 0.5, 0.2),
        row(1, 5.0, 6.0, 0.5, 0.2),
        row(2, 9.0, 1.0, 1.5, 0.3, above_controls=True),
        row(3, math.nan, 1.0, 1.0, 1.0),
        row(0, 0.5, 0.1, 0.2, None, sign=-1),
        row(0, 7.0, 1.0, 1.0, 1.0, examples="fit"),
    ]
    first, second, third = scoreboard(verdicts(rows))
    assert (first.examples, first.sign, first.n, first.median_kl_ratio) == ("held_out", 1, 3, 5.0)
    assert first.share_above_1 == pytest.approx(2 / 3)
    assert first.share_above_controls == pytest.approx(2 / 3)
    assert first.share_surely_above_controls == pytest.approx(1 / 3)
    assert (first.median_norm_control, first.median_random_control, first.median_other_control) == (1.0, 0.5, 0.2)
    assert second.median_other_control is None
    assert (second.examples, second.sign, second.share_above_1, second.share_above_controls) == ("held_out", -1, 0, 1)
    assert (third.examples, third.median_kl_ratio) == ("fit", 7.0)
