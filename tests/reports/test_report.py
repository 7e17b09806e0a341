from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from html import escape
from pathlib import Path

import pytest
from npeff.query.errors import QueryError
from npeff.reports.report import duration, number, percent, ratio, write_report
from npeff.store.tables import read_table, rows_to_columns, write_table
from places import place

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>"""


def test_the_report_is_one_file_that_refers_to_nothing_outside(run) -> None:
    path = write_report(run.path)
    assert path == run.path / place("report/index.html")
    assert [item.name for item in path.parent.iterdir()] == ["index.html"]
    page = path.read_text(encoding="utf-8")
    assert re.findall(r"https?://|@import| src=", page) == []
    assert {value[:22] for value in re.findall(r"url\(([^)]*)\)", page)} == {"data:image/png;base64,"}
    assert {value[:1] for value in re.findall(r'href="([^"]*)"', page)} == {"#", "d"}


def test_every_component_has_a_card_and_every_link_a_target(run) -> None:
    page = write_report(run.path).read_text(encoding="utf-8")
    identifiers = re.findall(r'id="([^"]*)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert {f"component-{j}" for j in range(12)} <= set(identifiers)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(identifiers)


def test_cards_show_as_many_examples_as_asked_for(run) -> None:
    page = write_report(run.path, top_examples=2).read_text(encoding="utf-8")
    galleries = re.findall(r"<h4>(?:Held out|Fit) .*?</ol>", page, re.S)
    assert [gallery.count("<li") for gallery in galleries] == [2] * 22


def test_the_same_run_gives_the_same_report(run) -> None:
    first = write_report(run.path).read_bytes()
    assert write_report(run.path).read_bytes() == first


def test_text_of_the_data_set_is_escaped_everywhere(make_run: Callable) -> None:
    page = write_report(make_run(n_components=4, hostile_text=HOSTILE, inputs=True).path).read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    assert page.count(str(escape("<img src=x"))) > 100


@pytest.mark.parametrize(
    ("gone", "commands"),
    [
        (["verification"], {"verify", "inputs"}),
        (["verification", "layer_energy"], {"verify", "inputs", "lift"}),
        (["verification", "layer_energy", "components", "top_examples", "coefficients", "history"],
         {"verify", "inputs", "factorize"}),
        (["verification", "layer_energy", "components", "top_examples", "coefficients", "history", "examples",
          "classes"], {"verify", "inputs", "factorize"}),
    ],
)  # fmt: skip
def test_sections_of_stages_that_have_not_run_name_their_command(
    make_run: Callable, gone: list[str], commands: set[str]
) -> None:
    path = make_run(n_components=4).path
    for name in gone:
        (path / place(f"tables/{name}.parquet")).unlink()
    page = write_report(path).read_text(encoding="utf-8")
    asked_for = re.findall(r'<p class="missing">[^<]*<code>npeff (\w+) ([^<]*)</code>', page)
    assert {command for command, _ in asked_for} == commands
    assert {directory for _, directory in asked_for} == {str(path)}


def test_a_run_with_nothing_but_its_configuration_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("run_dir: here\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "Nothing is computed yet" in page
    assert "run_dir: here" in page


def test_a_single_component_has_a_report(make_run: Callable) -> None:
    page = write_report(make_run(n_components=1).path).read_text(encoding="utf-8")
    assert page.count('<article class="card"') == 1
    assert "Nearest components" not in page


def test_a_joint_ablation_has_a_section_if_there_is_one(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    assert "Joint ablation" not in write_report(path).read_text(encoding="utf-8")
    known = {"examples": "held_out", "n_removed": 1, "removed": [0], "displacement": 0.5, "overlap": 0.1}
    known |= {"kl_removed_top": 0.5, "kl_removed_matched": 0.25, "kl_top": 0.1, "kl_matched": 0.02}
    rows = [
        {"component": 2, "draw": draw, "adversarial": draw is None, "kl_ratio_matched": ratio, "still_there": ratio > 4}
        | known
        | {"kl_ratio_unablated": 8.0, "kl_ratio_predicted": None, "examples_passed": 100}
        for draw, ratio in [(0, 5.0), (1, 6.5), (2, 3.5), (None, 1.25)]
    ]
    write_table(
        path / place("tables/joint_ablation.parquet"), "joint_ablation", rows_to_columns(rows, "joint_ablation")
    )
    page = write_report(path).read_text(encoding="utf-8")
    section = page[page.index('<section id="joint-ablation"') :].partition("</section>")[0]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", section)
    assert cells == ["8.00", "5.00", "3.50", "1.25", "67%", "0.500", "0.250"]
    assert set(re.findall(r'href="#([^"]*)"', section)) == {"component-2"}


@pytest.mark.parametrize(("factor", "fails"), [(1.0, False), (0.01, True)])
def test_the_first_sentence_says_that_the_components_fail(make_run: Callable, factor: float, fails: bool) -> None:
    path = make_run(n_components=4).path
    file = path / place("tables/verification.parquet")
    rows = read_table(file, "verification").to_pylist()
    for row in rows:
        row["kl_ratio_matched"] *= factor
    write_table(file, "verification", rows_to_columns(rows, "verification"))
    page = write_report(path).read_text(encoding="utf-8")
    lede = page.partition('<p class="lede">')[2].partition("</p>")[0].strip()
    first = "<strong>The components of this run fail the verification: the median KL ratio on held-out examples, 0."
    assert lede.startswith(first) is fails
    assert ("fail the verification" in page) is fails


def test_text_examples_are_listed_as_text(make_run: Callable) -> None:
    page = write_report(make_run(n_components=4, text_instead_of_images=True).path).read_text(encoding="utf-8")
    assert "<img" not in page
    assert page.count("written by hand, number") > 50


def test_examples_without_labels_show_predictions_only(make_run: Callable) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = make_run(n_components=4).path
    table = path / place("tables/examples.parquet")
    examples = pq.read_table(table)
    for name in ("label", "correct"):
        position = examples.column_names.index(name)
        nothing = pa.nulls(len(examples), examples.schema.field(name).type)
        examples = examples.set_column(position, name, nothing)
    pq.write_table(examples, table)
    page = write_report(path).read_text(encoding="utf-8")
    assert "have the prediction <b>" in page
    assert "have the label" not in page
    assert "Model accuracy" not in page


def test_a_damaged_table_leaves_the_former_report_alone(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    before = write_report(path).read_bytes()
    shutil.copy(path / "run.yaml", path / place("tables/verification.parquet"))
    with pytest.raises(QueryError, match=r"verification\.parquet is damaged"):
        write_report(path)
    assert (path / place("report/index.html")).read_bytes() == before


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (float("nan"), "–"), (float("inf"), "∞"), (0.0, "0"), (7, "7"), (1200, "1,200"), (1234.5, "1,234"),
     (12.34, "12.3"), (1.234, "1.23"), (0.0456, "0.046"), (0.000456, "4.6e−04"), (-0.5, "−0.500")],
)  # fmt: skip
def test_numbers_have_about_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares_ratios_and_durations_read_as_people_write_them() -> None:
    assert (percent(0.123, 1), percent(None), ratio(3.456), ratio(None)) == ("12.3%", "–", "3.46×", "–")
    assert [duration(s) for s in (None, 5.25, 75, 7300)] == ["–", "5.2 s", "1 min 15 s", "2 h 1 min"]
