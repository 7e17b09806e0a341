from __future__ import annotations

import math
from typing import Any

import pytest
from npeff.statistics.verdict import scoreboard, verdicts


def row(
    component: int, ratio: float | None, norms: float | None, random: float | None, other: float | None, **more: Any
) -> dict[str, Any]:
    values = {"component": component, "examples": "held_out", "sign": 1, "kl_ratio": ratio, "above_controls": False}
    return {**values, "fisher_norm_ratio": norms, "random_kl_ratio": random, "other_kl_ratio": other, **more}


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


def test_the_scoreboard_keeps_signs_and_splits_apart_and_leaves_out_what_was_not_measured() -> None:
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
