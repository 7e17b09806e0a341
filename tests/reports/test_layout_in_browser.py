"""What a reader sees of the report in a browser: nothing is cut, runs together or lies on something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chromium import Browser
from npeff.reports.report import write_report
from places import place
from synthetic_run import SyntheticRun

pytestmark = pytest.mark.process

LAYER = "bert.encoder.layer.{}.attention.output.dense."
SECOND = "\nAnother sentence follows."
CUT = """[...document.body.querySelectorAll('*')].filter((e) => !(e instanceof SVGElement)
  && !e.closest('details:not([open]), pre, noscript, .tiles') && !e.matches('.snippet, input, textarea')
  && e.clientWidth > 0 && e.scrollWidth > e.clientWidth + 1)
  .map((e) => [e.tagName, e.className, e.scrollWidth, e.clientWidth, e.textContent.trim().slice(0, 40)])"""
OVERLAPPING = """[...document.querySelectorAll('svg')].flatMap((svg) => {
  const texts = [...svg.querySelectorAll('text:not(.infinite)')].filter((t) => t.checkVisibility() && t.textContent);
  const boxes = texts.map((t) => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 0.5
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3).map(([other]) => [name, other]));
})"""


def change(run: SyntheticRun, name: str, /, **columns: Callable[[list[dict[str, Any]]], list[Any]]) -> None:
    """Replace columns of a table of a run."""
    path = run.path / place(f"tables/{name}.parquet")
    table = pq.read_table(path)
    rows = table.to_pylist()
    for column, values in columns.items():
        kind = table.schema.field(column).type
        table = table.set_column(table.column_names.index(column), column, pa.array(values(rows), kind))
    pq.write_table(table, path)


@pytest.fixture
def wide_run(make_run: Callable[..., SyntheticRun]) -> SyntheticRun:
    """A run of pairs of texts with long names and ratios from 1e-9 to 1e12."""
    run = make_run(n_components=4, text_instead_of_images=True, hostile_text=SECOND, shares=True, inputs=True)
    change(run, "classes", name=lambda rows: [f"a class called number {row['class']}" for row in rows])
    names = pq.read_table(run.path / place("tables/layer_energy.parquet"))["parameter"].to_pylist()
    long = [LAYER.format(i % 8) + name.split("\n")[0] for i, name in enumerate(names)]
    change(run, "layer_energy", parameter=lambda _: long)
    ratios = [1e-9, 3e-4, 12.5, 1e12]
    for column in ("kl_ratio_matched", "random_kl_ratio"):
        change(run, "verification", **{column: lambda rows: [ratios[i % 4] for i in range(len(rows))]})
    return run


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_is_cut_and_no_labels_overlap(browser: Browser, wide_run: SyntheticRun, width: int) -> None:
    browser.open(write_report(wide_run.path), width=width)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    cut = browser.evaluate(CUT)
    # on a narrow page, wide tables and plots are in boxes that can be scrolled
    assert [found for found in cut if width == 1400 or "scroll" not in found[1].split()] == []
    assert browser.evaluate(OVERLAPPING) == []
    scrollable = "[...document.querySelectorAll('.scroll')].every((e) => getComputedStyle(e).overflowX === 'auto')"
    assert browser.evaluate(scrollable)
    names = browser.evaluate("[...document.querySelectorAll('#component-0 .energy tbody th')].map((e) => e.innerText)")
    assert len(set(names)) == len(names) == 8
    assert all(name.startswith("bert.encoder.layer.") for name in names)


@pytest.mark.parametrize("width", [1400, 400])
def test_nothing_of_a_report_with_images_is_cut(browser: Browser, run: SyntheticRun, width: int) -> None:
    browser.open(write_report(run.path), width=width)
    cut = browser.evaluate(CUT)
    assert [found for found in cut if width == 1400 or "scroll" not in found[1].split()] == []
    assert browser.evaluate(OVERLAPPING) == []
    places = "[...document.querySelectorAll('#component-0 .galleries > div')].map((e) => e.getBoundingClientRect())"
    tops, lefts, rights = (browser.evaluate(f"{places}.map((r) => r.{side})") for side in ("top", "left", "right"))
    card = "document.querySelector('#component-0 .body').getBoundingClientRect()"
    assert len(tops) >= 2
    if width == 1400:  # beside each other over the whole card, which is otherwise half empty
        assert len(set(tops)) == 1
        assert (lefts[0], rights[-1]) == pytest.approx(browser.evaluate(f"[{card}.left, {card}.right]"), abs=1)
    else:
        assert tops == sorted(set(tops))


def test_the_texts_of_a_pair_are_apart(browser: Browser, wide_run: SyntheticRun) -> None:
    browser.open(write_report(wide_run.path), width=1400)
    texts = browser.evaluate("[...document.querySelectorAll('.texts li')].map((e) => e.innerText)")
    assert texts
    for text in texts:
        lines = [line.strip() for line in text.split("\n")]
        assert any(line.startswith("Another sentence follows.") for line in lines), text
        assert not any("by hand" in line and "Another" in line for line in lines), text
    snippets = browser.evaluate("[...document.querySelectorAll('.snippet')].map((e) => e.textContent)")
    assert any(". / Another sentence" in snippet for snippet in snippets)


def test_checksums_are_closed(browser: Browser, make_run: Callable[..., SyntheticRun]) -> None:
    run = make_run(n_components=3)
    record = run.path / place("stages/factorize.json")
    record.write_text('{"explained": 0.667, "n_fit": 240, "lineage": "8ee8911d08004c2f333cab16b5caebbd", "seconds": 6}')
    browser.open(write_report(run.path))
    seen = "document.getElementById('fit').innerText"
    assert "0.667" not in browser.evaluate(seen)
    browser.evaluate("document.querySelectorAll('.stage').forEach((e) => { e.open = true; })")
    assert "0.667" in browser.evaluate(seen)
    assert "240" in browser.evaluate(seen)
    assert "8ee8911d" not in browser.evaluate(seen)
    browser.evaluate("document.querySelectorAll('.checksums').forEach((e) => { e.open = true; })")
    assert "8ee8911d08004c2f333cab16b5caebbd" in browser.evaluate(seen)


def test_a_step_that_breaks_the_model_is_named(browser: Browser, make_run: Callable[..., SyntheticRun]) -> None:
    run = make_run(n_components=4)

    def broken(rows: list[dict[str, Any]]) -> list[float]:
        step = (1, "fit", -1)
        return [0.04 if (r["component"], r["examples"], r["sign"]) == step else r["accuracy_top_after"] for r in rows]

    change(run, "verification", accuracy_top_after=broken, accuracy_top_before=lambda rows: [0.97] * len(rows))
    browser.open(write_report(run.path))
    said = "the step breaks the model, whose accuracy falls from 97% to 4% on the top examples."
    of_cards = browser.evaluate("[...document.querySelectorAll('.card')].map((e) => e.innerText)")
    assert [said in text for text in of_cards] == [False, True, False, False]
    assert f"Component 1, step −, fit: {said}" in browser.evaluate("document.getElementById('verification').innerText")


def test_of_a_report_without_broken_models_no_step_is_named(browser: Browser, run: SyntheticRun) -> None:
    browser.open(write_report(run.path))
    assert "breaks the model" not in browser.evaluate("document.body.innerText")
