from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from npeff.reports.charts import Axis, log_axis, loss_chart, ratio_chart
from npeff.reports.selection_chart import selection_chart
from npeff.statistics.verdict import verdicts

positive = st.floats(1e-6, 1e6)
RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def value_of(label: str) -> float:
    """The number that a label shows: 0.01, 1000 or 10⁻⁶."""
    plain = label.translate(RAISED)
    return float(label) if plain == label else 10.0 ** int(plain.removeprefix("10"))


@given(st.floats(-300, 0), st.floats(0, 300), st.floats(60, 1200), st.integers(2, 12), st.booleans())
@example(low=-23.75, high=2.5, length=60.0, at_most=2, log=True)
def test_labels_of_an_axis_are_apart_at_any_range(
    low: float, high: float, length: float, at_most: int, log: bool
) -> None:
    axis = Axis(10.0**low, 10.0 ** (high + 0.3), 0, length, log=True) if log else Axis(low, high + 1e-3, 0, length)
    level = axis.level_ticks(at_most=at_most)
    assert 1 <= len(level) <= at_most + 1
    for a, b in pairwise(level):
        assert b.position - a.position >= 7 * (len(a.label) + len(b.label)) / 2
    if log:
        assert any(tick.value == 1 for tick in level)
        assert all(b.position - a.position >= 15.9 for a, b in pairwise(axis.ticks()))


@given(st.lists(positive, max_size=20))
def test_a_log_axis_holds_all_values_and_one_between_labelled_decades(values: list[float]) -> None:
    axis = log_axis([*values, None, math.inf, 0.0], 300, 10)
    assert axis.low <= min([1.0, *values])
    assert max([1.0, *values]) <= axis.high
    ticks = axis.ticks()
    assert ticks[0].position == 300
    assert ticks[-1].position == 10
    assert value_of(ticks[0].label) == pytest.approx(axis.low)
    assert all(value_of(tick.label) == pytest.approx(tick.value) for tick in ticks)
    assert axis.position(0.0) == 300
    assert axis.position(math.inf) == 10


@given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e5), st.integers(2, 9))
def test_linear_ticks_are_round_few_and_where_their_labels_say(low: float, span: float, about: int) -> None:
    axis = Axis(low, low + span, 0, 1000)
    ticks = axis.ticks(about)
    assert 1 <= len(ticks) <= about + 3
    assert len({tick.label for tick in ticks}) == len(ticks)
    for tick in ticks:
        assert axis.position(float(tick.label)) == pytest.approx(tick.position, abs=0.02)


def history(losses: list[float], rejected: tuple[int, ...] = (), total: float = 200.0) -> list[dict]:
    return [
        {"iteration": i, "loss": loss, "explained": 1 - loss / total, "accepted": i not in rejected}
        for i, loss in enumerate(losses)
    ]


def test_the_loss_curve_falls_on_the_page_and_passes_by_rejected_trials() -> None:
    chart = loss_chart(history([100.0, 5000.0, 60.0, 50.0], rejected=(1,)))
    assert chart is not None
    heights = [step.y for step in chart.steps if step.accepted]
    assert heights == sorted(heights)
    assert chart.rejected[0].above
    assert chart.rejected[0].y == chart.y_axis.stop
    assert len(chart.line.split()) == 3


def test_the_explained_axis_reads_the_same_line() -> None:
    chart = loss_chart(history([100.0, 60.0, 50.0]))
    assert chart is not None
    for tick in chart.explained_ticks:
        assert tick.position == pytest.approx(chart.y_axis.position(200.0 * (1 - float(tick.label))), abs=0.02)
    assert len(chart.explained_ticks) >= 3


def test_one_iteration_and_none_are_no_trouble() -> None:
    assert loss_chart([]) is None
    assert loss_chart(history([math.nan])) is None
    chart = loss_chart(history([3.0]))
    assert chart is not None
    assert len(chart.steps) == 1


def test_components_are_sorted_by_their_weaker_sign_and_signs_stand_apart() -> None:
    values = {0: (9.0, 2.0), 1: (4.0, 5.0), 2: (1.0, 30.0)}
    rows = [
        {"component": j, "examples": "fit", "sign": sign, "kl_ratio": ratio, "fisher_norm_ratio": 1.0,
         "random_kl_ratio": 3.0, "other_kl_ratio": None}
        for j, pair in values.items() for sign, ratio in zip((1, -1), pair, strict=True)
    ]  # fmt: skip
    chart = ratio_chart("fit", verdicts(rows), log_axis([9.0, 30.0], 330, 14))
    assert chart is not None
    assert [slot.component for slot in chart.slots] == [1, 0, 2]
    for mark in chart.lollipops:
        slot = next(slot for slot in chart.slots if slot.component == mark.verdict.component)
        assert (mark.x < slot.x) == (mark.verdict.sign > 0)
        assert (mark.ratio_y < mark.best_control_y) == (mark.verdict.above_controls is True)  # type: ignore[operator]
    assert ratio_chart("held_out", verdicts(rows), chart.y_axis) is None


def test_many_components_keep_their_labels_apart() -> None:
    rows = [
        {
            "component": j,
            "examples": "fit",
            "sign": 1,
            "kl_ratio": 2.0,
            "fisher_norm_ratio": 1.0,
            "random_kl_ratio": 1.0,
            "other_kl_ratio": 0.5,
        }
        for j in range(512)
    ]
    chart = ratio_chart("fit", verdicts(rows), log_axis([2.0], 330, 14))
    assert chart is not None
    labelled = [slot.x for slot in chart.slots if slot.labelled]
    assert min(b - a for a, b in pairwise(labelled)) >= 24


def test_the_plot_of_a_search_has_a_point_for_every_number_and_leaves_out_what_was_not_measured() -> None:
    rows = [
        {
            "n_components": k,
            "explained_held_out": 0.1 * k,
            "n_come_back": k / 2,
            "cosine_halves": 0.9,
            "cosine_seeds": None,
            "silhouette_mean": None if k == 1 else -0.2,
            "recommended": k == 4,
        }
        for k in (8, 1, 4)
    ]
    chart = selection_chart(rows)
    assert chart is not None
    assert (chart.recommended, chart.recommended_x) == (4, chart.x_axis.position(4))
    assert chart.y_axis.low == -0.2
    assert {series.name: len(series.points) for series in chart.series} == {
        "held_out": 3, "share_back": 3, "cosine_halves": 3, "silhouette": 2
    }  # fmt: skip
    for series in chart.series:
        assert [x for x, _ in series.points] == sorted(x for x, _ in series.points)
    assert {y for _, y in chart.series[1].points} == {chart.y_axis.position(0.5)}
    assert selection_chart([]) is None
    assert (chart.information, chart.rank, chart.rank_x) == (None, None, None)
    shares = [0.3, 0.5, 0.6, 0.7, 0.75]
    with_spectrum = selection_chart(rows, shares, 2.5)
    assert with_spectrum is not None
    x, y = chart.x_axis.position, chart.y_axis.position
    assert with_spectrum.information == " ".join(f"{x(k)},{y(share)}" for k, share in enumerate(shares, start=1))
    assert with_spectrum.rank_x == x(2.5)
    outside = selection_chart(rows, shares, 40.0)
    assert outside is not None
    assert (outside.rank, outside.rank_x) == (40.0, None)
