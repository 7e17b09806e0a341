"""The report in a headless Chromium."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from chromium import Browser
from npeff.query.components import ComponentStore
from npeff.reports import in_common, report
from npeff.reports.report import write_report

pytestmark = pytest.mark.process

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"""


@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (420, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
        pytest.param(420, "light", marks=pytest.mark.slow),
    ],
)
def test_the_report_opens_without_complaints_requests_or_sideways_scrolling(
    browser: Browser, run, scheme: str, width: int
) -> None:
    report = write_report(run.path)
    browser.open(report, width=width, scheme=scheme)
    assert browser.complaints == []
    assert browser.requests == [report.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    shown = "[...document.querySelectorAll('.image')].map((e) => getComputedStyle(e).backgroundImage.slice(0, 20))"
    assert set(browser.evaluate(shown)) == {'url("data:image/png;'}
    assert browser.evaluate("getComputedStyle(document.querySelector('.gallery .image')).imageRendering") == "pixelated"
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background.strip("rgb()").split(","))
    assert (brightness > 600) == (scheme == "light")


@pytest.mark.parametrize(
    ("texts", "at_once"),
    [
        (False, 64),
        (True, 1),
        pytest.param(False, 1, marks=pytest.mark.slow),
        pytest.param(True, 64, marks=pytest.mark.slow),
    ],
)
def test_text_of_the_data_set_is_shown_as_text(
    browser: Browser, make_run: Callable, monkeypatch, at_once: int, texts: bool
) -> None:
    monkeypatch.setattr(report, "CARDS_AT_ONCE", at_once)
    monkeypatch.setattr(in_common, "SIGNIFICANT", 2.0)
    run = make_run(n_components=4, hostile_text=HOSTILE, text_instead_of_images=texts, shares=True, inputs=True)
    browser.open(write_report(run.path))
    browser.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert browser.complaints == []
    assert len(browser.requests) == 1
    assert browser.evaluate("document.scripts.length") == 1
    assert browser.evaluate("document.images.length") == 0
    places = [".finding b", ".caption", ".mix th[scope=row]", ".energy th[scope=row]", ".common th",
              "details th[scope=row]", "pre", "#provenance dd",
              ".nats", ".groups th[scope=row]", ".methods th[scope=row]", "svg.dots title"]  # fmt: skip
    for place in places + (["#component-0 .text", ".evidence .text", ".tokens b", ".text q"] if texts else []):
        seen = browser.evaluate(f"[...document.querySelectorAll('{place}')].map((e) => e.textContent).join(' ')")
        assert HOSTILE in seen, place


def test_the_page_refuses_scripts_that_are_not_its_own(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    browser.evaluate(
        "(() => { const s = document.createElement('script'); s.textContent = 'window.intruder = 1';"
        " document.body.append(s); })()"
    )
    assert browser.evaluate("window.intruder") is None


def test_headings_sort_the_table_both_ways_with_missing_values_last(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    headings = browser.evaluate("[...document.querySelectorAll('.sortable th button')].map((b) => b.textContent)")
    place = "[...document.querySelectorAll('.sortable th[scope=col]')].findIndex((h) => h.textContent == 'KL held out')"
    ratios = f"[...document.querySelectorAll('.sortable tbody tr')].map((r) => r.cells[{place}].dataset.value)"
    click = "document.querySelectorAll('.sortable th button')[6].click()"
    assert headings[6] == "KL held out"

    browser.evaluate(click)
    values = browser.evaluate(ratios)
    measured = [float(value) for value in values if value]
    assert len(measured) == 11
    assert values[-1] == ""
    assert measured == sorted(measured, reverse=True)
    assert measured[0] == float("inf")
    assert browser.evaluate("document.querySelector('[aria-sort]').textContent") == "KL held out"

    browser.evaluate(click)
    values = browser.evaluate(ratios)
    measured = [float(value) for value in values if value]
    assert values[-1] == ""
    assert measured == sorted(measured)

    browser.evaluate("document.querySelector('.sortable th button').click()")
    order = browser.evaluate("[...document.querySelectorAll('.sortable tbody th')].map((c) => Number(c.textContent))")
    assert order == list(range(12))
    assert browser.evaluate("document.querySelectorAll('[aria-sort]').length") == 1


def test_the_two_plots_take_turns_on_screen(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    shown = "[...document.querySelectorAll('.switch figure')].map((f) => getComputedStyle(f).display)"
    assert browser.evaluate(shown) == ["block", "none"]
    browser.evaluate("document.querySelector('#show-2').click()")
    assert browser.evaluate(shown) == ["none", "block"]


def test_a_card_is_reached_by_its_link(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    browser.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
    browser.evaluate("document.querySelector('svg a[href=\"#component-7\"]').dispatchEvent(new MouseEvent('click'))")
    top = browser.evaluate("document.querySelector('#component-7').getBoundingClientRect().top")
    assert 0 <= top < 120


def shown_components(browser: Browser) -> list[int]:
    rows = "[...document.querySelectorAll('.sortable tbody tr')].filter((r) => r.checkVisibility())"
    return browser.evaluate(f"{rows}.map((r) => Number(r.cells[0].textContent))")


@pytest.mark.parametrize("at_once", [64, pytest.param(2, marks=pytest.mark.slow)])
def test_the_search_finds_components_by_what_their_cards_say(
    browser: Browser, make_run: Callable, monkeypatch, at_once: int
) -> None:
    monkeypatch.setattr(report, "CARDS_AT_ONCE", at_once)
    run = make_run(n_components=6, text_instead_of_images=True)
    browser.open(write_report(run.path))
    top = ComponentStore.open(run.path).table("top_examples")
    card_of = "document.getElementById('component-{}')"
    wanted = top["example"][0].as_py()
    browser.evaluate("document.getElementById('search').focus()")
    for key in f"number {wanted}.":
        browser.press(key)
    found = shown_components(browser)
    assert 0 in found
    assert len(found) < 6
    assert browser.evaluate("document.getElementById('found').textContent") == f"{len(found)} of 6"
    for component in range(6):
        browser.evaluate(f"location.hash = 'component-{component}'")
        said = browser.evaluate(card_of.format(component) + ".textContent")
        assert (f"number {wanted}." in said) == (component in found), component
    browser.evaluate("(() => { const box = document.getElementById('search'); box.value = '<p &amp; nothing';"
                     " box.dispatchEvent(new Event('input')); })()")  # fmt: skip
    assert shown_components(browser) == []


def test_the_page_is_used_with_the_keyboard(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    focused = "document.activeElement.textContent"
    browser.press("Tab")
    assert browser.evaluate(focused) == "Skip to the components"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    browser.press("Enter")
    assert browser.evaluate("location.hash") == "#components"
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.id") == "search"
    for _ in range(3):
        browser.press("Tab")
    assert browser.evaluate(focused) == "Most common label"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.closest('th').getAttribute('aria-sort')") == "ascending"
    browser.press("Enter")
    assert browser.evaluate("document.activeElement.closest('th').getAttribute('aria-sort')") == "descending"


def test_everything_has_a_name_and_headings_do_not_skip(browser: Browser, run) -> None:
    browser.open(write_report(run.path))
    nameless = (
        "[...document.querySelectorAll('[role=img], [role=group], input, svg:not([aria-hidden])')].filter((e) =>"
        " !e.getAttribute('aria-label') && !e.title && !(e.labels && e.labels.length))"
        ".map((e) => e.outerHTML.slice(0, 99))"
    )
    assert browser.evaluate(nameless) == []
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_with_many_components_a_card_is_made_when_it_is_linked_to_seen_or_printed(
    browser: Browser, run, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(report, "CARDS_AT_ONCE", 2)
    page = write_report(run.path)
    made = "[...document.querySelectorAll('.card')].filter((c) => !c.querySelector('noscript')).length"
    browser.call("Page.navigate", url="about:blank")  # the same page is not loaded anew for another fragment
    browser.open(page.resolve().as_uri() + "#component-8")
    assert browser.evaluate("document.querySelectorAll('#component-8 .gallery li').length") > 10
    assert -10 <= browser.evaluate("document.querySelector('#component-8').getBoundingClientRect().top") < 120
    browser.open(page)
    assert browser.evaluate(made) < 3
    assert browser.evaluate("document.querySelectorAll('#component-9 h3').length") == 1
    browser.evaluate("document.querySelector('#component-9').scrollIntoView({behavior: 'instant'})")
    seen = "document.querySelectorAll('#component-9 .gallery li').length"
    deadline = time.monotonic() + 20
    while not browser.evaluate(seen) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert browser.evaluate(seen) > 10
    browser.print(tmp_path / "report.pdf")
    assert browser.evaluate(made) == 12
    assert browser.complaints == []


def test_with_many_components_the_page_is_readable_without_scripts(browser: Browser, run, monkeypatch) -> None:
    monkeypatch.setattr(report, "CARDS_AT_ONCE", 2)
    page = write_report(run.path)
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        assert browser.evaluate("document.querySelectorAll('#component-9 .gallery li').length") > 10
        assert browser.evaluate("document.querySelector('#component-9 .gallery li').checkVisibility()")
        assert not browser.evaluate("document.querySelector('.search').checkVisibility()")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_shares_are_laid_over_images_and_can_be_hidden(browser: Browser, make_run: Callable) -> None:
    browser.open(write_report(make_run(n_components=3, shares=True).path))
    shown = "document.querySelector('.gallery .heat').checkVisibility()"
    assert browser.evaluate(shown)
    browser.evaluate("document.getElementById('heat').click()")
    assert not browser.evaluate(shown)


SMALLEST_TEXT = """[...document.querySelectorAll('svg.dots')].map((svg) =>
  parseFloat(getComputedStyle(svg.querySelector('text')).fontSize) * svg.getScreenCTM().a)"""
LABELS_INSIDE = """[...document.querySelectorAll('svg.dots text')].every((text) => {
  const [a, b] = [text, text.ownerSVGElement].map((e) => e.getBoundingClientRect());
  return b.left <= a.left && a.right <= b.right && a.bottom <= b.bottom;
})"""
HEAT_WIDTHS = "[...document.querySelectorAll('.side-by-side .heat')].map((e) => e.getBoundingClientRect().width)"


@pytest.mark.parametrize("width", [1400, 400])
def test_the_evidence_of_the_inputs_is_readable(browser: Browser, informed_run, width: int) -> None:
    browser.open(write_report(informed_run.path), width=width)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert min(browser.evaluate(SMALLEST_TEXT)) > 10
    assert browser.evaluate(LABELS_INSIDE)
    assert min(browser.evaluate(HEAT_WIDTHS)) > 40
    seen = browser.evaluate("document.querySelector('.gallery li').innerText").split("\n")
    assert [line for line in seen if line in ("parameters", "inputs")] == ["parameters", "inputs"]
    assert browser.evaluate("[...document.querySelectorAll('.nats')].every((e) => e.checkVisibility())")
    colours = [f"getComputedStyle(document.querySelector('.legend .{name}6')).backgroundColor" for name in "sn"]
    assert len({browser.evaluate(colour) for colour in colours}) == 2
    browser.evaluate("document.getElementById('heat').click()")
    assert browser.evaluate(HEAT_WIDTHS + ".every((width) => width === 0)")


LONG_VALUES = {
    "Examples": "12,345,678",
    "Components": "512",
    "Explained": "100.0%",
    "Median matched KL ratio": "1234.5×",
    "Above all controls": "100%",
}
FILL_TILES = """((values) => { for (const tile of document.querySelectorAll('.tiles > div')) {
  const value = values[tile.querySelector('dt').textContent];
  if (value) tile.querySelector('dd').firstChild.textContent = value;
} })(%s)"""
BOXES = """[...document.querySelectorAll('%s')].map((box) => {
  const edges = (r) => [r.left, r.top, r.right, r.bottom];
  const texts = [], walk = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const range = document.createRange();
    range.selectNodeContents(walk.currentNode);
    if (walk.currentNode.data.trim()) texts.push(...[...range.getClientRects()].map(edges));
  }
  const controls = [...box.querySelectorAll('input, select, textarea, button')];
  texts.push(...controls.map((control) => edges(control.getBoundingClientRect())));
  return {name: box.textContent.trim().slice(0, 20), edges: edges(box.getBoundingClientRect()), texts};
})"""


def assert_boxes_are_apart(browser: Browser, selector: str, width: int) -> None:
    """The text and the controls of every box lie inside it, and no two boxes overlap; a pixel is for rounding."""
    boxes = browser.evaluate(BOXES % selector)
    assert len(boxes) >= 5
    for box in boxes:
        left, top, right, bottom = box["edges"]
        assert 0 <= left < right <= width, box
        assert box["texts"], box
        for x, y, x_end, y_end in box["texts"]:
            assert left - 1 <= x < x_end <= right + 1, box
            assert top - 1 <= y < y_end <= bottom + 1, box
    for first, second in combinations(boxes, 2):
        a, b = first["edges"], second["edges"]
        shared = [min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
        assert min(shared) < 1, (first["name"], second["name"])


@pytest.mark.parametrize("width", [1400, 400, *(pytest.param(width, marks=pytest.mark.slow) for width in (1000, 700))])
def test_tiles_hold_their_values_and_do_not_overlap(browser: Browser, run, width: int) -> None:
    browser.open(write_report(run.path), width=width)
    assert_boxes_are_apart(browser, ".tiles > div", width)
    browser.evaluate(FILL_TILES % json.dumps(LONG_VALUES))
    shown = browser.evaluate("document.querySelector('.tiles').textContent")
    assert all(value in shown for value in LONG_VALUES.values())
    assert_boxes_are_apart(browser, ".tiles > div", width)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
