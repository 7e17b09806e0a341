"""The report in a headless Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from chromium import Browser, find_chromium

from pipeline.query import write_report

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium or Chrome is installed: the report was not opened in a browser")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
def test_the_report_opens_without_complaints_requests_or_sideways_scrolling(
    browser: Browser, run, scheme: str, width: int
) -> None:
    report = write_report(run.path)
    browser.open(report, width=width, scheme=scheme)
    assert browser.complaints == []
    assert browser.requests == [report.as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth === 8)")
    assert browser.evaluate("getComputedStyle(document.querySelector('.gallery img')).imageRendering") == "pixelated"
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in background.strip("rgb()").split(","))
    assert (brightness > 600) == (scheme == "light")


def test_text_of_the_data_set_is_shown_as_text(browser: Browser, make_run: Callable) -> None:
    browser.open(write_report(make_run(n_components=4, hostile_text=HOSTILE).path))
    assert browser.complaints == []
    assert len(browser.requests) == 1
    assert browser.evaluate("document.scripts.length") == 1
    assert browser.evaluate("document.querySelectorAll('img:not([src^=\"data:image/png\"])').length") == 0
    for place in ("h1", ".finding b", ".gallery .caption", ".mix th[scope=row]", ".energy th[scope=row]",
                  "details th[scope=row]", "details td:last-child", "pre", "#provenance dd"):  # fmt: skip
        texts = browser.evaluate(f"[...document.querySelectorAll('{place}')].map((e) => e.textContent).join(' ')")
        assert HOSTILE in texts, place


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
    ratios = "[...document.querySelectorAll('.sortable tbody tr')].map((r) => r.cells[7].dataset.value)"
    click = "document.querySelectorAll('.sortable th button')[6].click()"
    assert headings[6] == "KL + held out"

    browser.evaluate(click)
    values = browser.evaluate(ratios)
    measured = [float(value) for value in values if value]
    assert len(measured) == 11
    assert values[-1] == ""
    assert measured == sorted(measured, reverse=True)
    assert measured[0] == float("inf")
    assert browser.evaluate("document.querySelector('[aria-sort]').textContent") == "KL + held out"

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
