from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npeff.query.tables import RunTables
from npeff.reports import input_groups, inputs_section
from npeff.reports.faithfulness_chart import faithfulness_plots
from npeff.reports.report import write_report
from npeff.store.tables import rows_to_columns, write_table
from places import place


def write(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    file = path / place(f"tables/{name}.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(file, name, rows_to_columns(rows, name))


def explained(information: list[float | None], entropy: list[float | None]) -> list[dict[str, Any]]:
    other = {"class": 0, "n_samples": 8, "information_se": None, "entropy_se": None, "prediction_stable": None}
    return [
        other | {"example": i, "information": pair[0], "entropy": pair[1], "shape": [2]}
        for i, pair in enumerate(zip(information, entropy, strict=True))
    ]


def test_the_section_has_quartiles_and_a_chart_of_the_finite_examples(tmp_path: Path, monkeypatch) -> None:
    information = [0.1, 0.4, 0.2, None, 1e-9, 0.8]
    write(tmp_path, "inputs", explained(information, [0.05, 0.1, None, None, -1e-4, 0.4]))
    found = inputs_section.inputs_section(RunTables(tmp_path), {})
    assert found is not None
    assert (found.n_examples, found.n_invalid) == (6, 1)
    known = [value for value in information if value is not None]
    assert found.information == tuple(np.quantile(known, [0.25, 0.5, 0.75]))
    assert found.ratio == 2.0
    chart = found.chart
    assert chart is not None
    assert chart.n_examples == 4
    assert (chart.x_axis.low, chart.x_axis.high) == (1e-6, 1.0)
    assert chart.points[2] == (chart.x_axis.start, chart.y_axis.start)  # too small for the axes
    assert chart.points[0] == (chart.x_axis.position(0.05), chart.y_axis.position(0.1))
    assert (found.groups, found.faithfulness) == (None, None)
    monkeypatch.setattr(inputs_section, "POINTS_SHOWN", 3)
    fewer = inputs_section.inputs_section(RunTables(tmp_path), {})
    assert fewer is not None
    assert fewer.chart is not None
    assert fewer.chart.points == [chart.points[i] for i in (0, 2, 3)]


def test_without_entropies_or_finite_examples_there_is_no_chart(tmp_path: Path) -> None:
    for information in ([0.5, 0.6], [None, None], []):
        write(tmp_path, "inputs", explained(information, [None] * len(information)))
        found = inputs_section.inputs_section(RunTables(tmp_path), {})
        assert found is not None
        assert (found.chart, found.ratio) == (None, None)
        assert (found.information is None) == (information != [0.5, 0.6])


def test_group_means_are_over_the_examples_that_have_the_group(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"example": example, "group": f"group {group}", "information": float(rng.random()), "share": share}
        for example in range(40)
        for group in range(5)
        if (share := None if example == 7 else float(rng.normal(group, 1))) is None or rng.random() < 0.7
    ]
    write(tmp_path, "input_groups", rows)
    members = {0: [1, 2, 3, 30], 1: [7], 2: list(range(20, 40)), 3: []}
    monkeypatch.setattr(input_groups, "GROUPS_SHOWN", 3)
    found = input_groups.input_groups(RunTables(tmp_path), members)
    assert found is not None
    assert found.n_groups == 5

    def mean(name: str, group: str, examples: list[int]) -> float | None:
        of = [
            row[name] for row in rows if row["group"] == group and row["example"] in examples and row[name] is not None
        ]
        return sum(of) / len(of) if of else None

    everyone = list(range(40))
    assert [group.name for group in found.shown] == ["group 4", "group 3", "group 2"]
    for group in found.shown:
        assert group.share == pytest.approx(mean("share", group.name, everyone))
        assert group.information == pytest.approx(mean("information", group.name, everyone))
    expected = defaultdict(dict)
    for component, examples in members.items():
        for group in found.shown:
            if (share := mean("share", group.name, examples)) is not None:
                expected[component][group.name] = share
    assert {c: {g.name: pytest.approx(g.share) for g in of} for c, of in found.of_component.items()} == expected
    best = max(expected, key=lambda component: expected[component].get("group 3", -9.0))
    assert found.largest_for("group 3") == (best, pytest.approx(expected[best]["group 3"]))


def scored(metric: str, replacement: str, method: str, mean: float, difference: float | None) -> dict[str, Any]:
    row = {"metric": metric, "replacement": replacement, "method": method, "mean": mean, "n_examples": 9}
    row |= {"low": mean - 0.1, "high": mean + 0.1, "passes_per_example": 2.0}
    low, high = (None, None) if difference is None else (difference - 0.1, difference + 0.1)
    row |= {"difference": difference, "difference_low": low, "difference_high": high}
    return row | {"knows_replacement": method == "occlusion"}


def test_methods_are_sorted_by_what_is_good_and_the_information_is_first() -> None:
    rows = [
        scored("deletion", "mean", "ours", 0.3, None),
        scored("deletion", "mean", "occlusion", 0.1, 0.2),
        scored("deletion", "mean", "gradient", 0.35, -0.05),
        scored("deletion", "mean", "failed", float("nan"), float("nan")),
        scored("information", "given_the_rest", "ours", 0.2, None),
        scored("information", "resample", "ours", 0.5, None),
        scored("information", "resample", "occlusion", 0.8, -0.3),
        scored("information", "resample", "gradient", 0.3, 0.2),
    ]
    found = faithfulness_plots(rows)
    assert found is not None
    assert [(plot.metric, plot.replacement) for plot in found.plots] == [
        ("information", "resample"), ("information", "given_the_rest"), ("deletion", "mean")
    ]  # fmt: skip
    first, _, last = found.plots
    assert [dot.label for dot in first.dots] == ["occlusion", "ours", "gradient"]
    assert [dot.label for dot in last.dots] == ["occlusion", "ours", "gradient"]
    assert [(plot.low_is_good) for plot in found.plots] == [False, False, True]
    assert [dot.knows for dot in last.dots] == [True, False, False]
    assert all(dot.low_x < dot.x < dot.high_x for plot in found.plots for dot in plot.dots)
    assert first.dots[0].x > first.dots[1].x > first.dots[2].x
    assert [method.label for method in found.methods] == ["occlusion", "ours", "gradient"]
    verdicts = {m.label: [None if cell is None else cell.verdict for cell in m.cells] for m in found.methods}
    assert verdicts == {"occlusion": ["worse", None, "worse"], "ours": ["", "", ""], "gradient": ["better", None, ""]}
    assert faithfulness_plots([scored("deletion", "mean", "ours", float("nan"), None)]) is None
    assert faithfulness_plots([]) is None


def test_the_section_shows_groups_and_the_comparison(informed_run) -> None:
    page = write_report(informed_run.path).read_text("utf-8")
    section = page[page.index('<section id="inputs"') :].partition("</section>")[0]
    assert "median 0.500 nats" in section
    assert ", 1 of them not finite" in section
    assert "inputs not finite</small>" in page
    assert re.findall(r'<b>(\w+, \w+)</b> <span class="muted">(\w+) is good', section) == [
        ("Information, resample", "high"), ("Deletion, mean", "low")
    ]  # fmt: skip
    assert section.count('class="published knows"') == 2  # the key and one dot
    assert "functional information (ours)" in section
    assert "(0.200: 0.150 to 0.250)" in section
    assert page.count("Information by group of inputs") == 2  # the last component is unused


def test_both_kinds_of_evidence_of_an_image_are_side_by_side(informed_run) -> None:
    page = write_report(informed_run.path).read_text("utf-8")
    assert page.count("<small>parameters</small>") == page.count("<small>inputs</small>") > 20
    assert "Show shares on the images" in page
    assert "0.500 nats for" in page
    assert "75% stable" in page


def test_both_kinds_of_evidence_of_a_text_are_side_by_side(make_run: Callable) -> None:
    run = make_run(n_components=3, shares=True, inputs=True, text_instead_of_images=True)
    page = write_report(run.path, top_examples=2).read_text("utf-8")
    both = '<small class="what">parameters</small>', '<small class="what">inputs</small>'
    first, second = (page.count(label) for label in both)
    assert second >= first > 5
    assert page.count("<b class=n6>by</b>") > 5
