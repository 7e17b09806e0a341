"""The live view in a headless Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from chromium import Browser, wait
from live_server import running
from npeff.live.pages import View
from npeff.live.queries import forms
from npeff.live.server import LiveServer
from npeff.live.templates import style
from npeff.query.components import ComponentStore
from npeff.store.annotations import Annotation, write_annotations

pytestmark = pytest.mark.process

WIDTHS = (1400, 400)
PAGES = ("/", "/component/2", "/example/digit-0003", "/query/top?component=2&n=3", "/try", "/step?component=2", "/no")
OVERLAPPING = """[...document.querySelectorAll('form > *, .panel')].filter((a) => {
  const [r, outer] = [a, a.parentElement].map((e) => e.getBoundingClientRect());
  return a.checkVisibility() && r.width && (r.right > outer.right + 1 || r.left < outer.left - 1);
}).map((e) => e.outerHTML.slice(0, 80))"""
SHOWN = "[...document.querySelectorAll('#result tbody th')].map((e) => Number(e.textContent))"


@pytest.fixture(scope="module")
def server(run) -> Iterator[LiveServer]:
    yield from running(run.path)


@pytest.fixture(scope="module")
def shown_id(run) -> str:
    """The id of an example on the card of component 0."""
    top = ComponentStore.open(run.path).table("top_examples")
    return f"digit-{top['example'][0].as_py():04d}"


def test_every_page_fits_its_window_and_asks_only_this_server(browser: Browser, server: LiveServer) -> None:
    browser.open(server.address)
    home = f"http://127.0.0.1:{server.port}"
    assert browser.evaluate("location.href") == f"{home}/", "the token is not in the address"
    for path in PAGES:
        for width in WIDTHS:
            browser.open(home + path, width=width)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
            assert browser.evaluate(OVERLAPPING) == [], (path, width)
            assert {url[: len(home)] for url in browser.requests} == {home}
            complaints = [text for text in browser.complaints if "404" not in text or path != "/no"]
            assert complaints == [], path


def test_pictures_are_shown(browser: Browser, server: LiveServer) -> None:
    browser.open(server.address)
    home = f"http://127.0.0.1:{server.port}"
    for path in ("/", "/example/3", "/query/top?component=2&n=3"):
        browser.open(home + path)
        # images that are not in view load later
        browser.evaluate("Promise.all([...document.images].map((i) => { i.loading = 'eager'; return i.decode(); }))")
        assert set(browser.evaluate("[...document.images].map((i) => i.naturalWidth)")) == {8}, path
    browser.open(home + "/component/2")
    shown = "[...document.querySelectorAll('.gallery .image')].map((e) => getComputedStyle(e).backgroundImage)"
    assert {url.partition("?")[0] for url in browser.evaluate(shown)} == {f'url("{home}/image'}
    assert browser.complaints == []


def test_the_search_and_the_order_are_in_the_address(browser: Browser, server: LiveServer, shown_id: str) -> None:
    browser.open(server.address)
    everything = browser.evaluate(SHOWN)
    assert everything == list(range(12))
    browser.evaluate("document.querySelector('input[type=search]').focus()")
    for key in shown_id:
        browser.press(key)
    wait(browser, f"location.search.includes('q={shown_id}')")
    found = browser.evaluate(SHOWN)
    assert 0 < len(found) < 12
    assert len(browser.evaluate("[...document.querySelectorAll('.map svg[role=img] a')].map((e) => 1)")) == len(found)
    browser.evaluate("[...document.querySelectorAll('thead a')].find((e) => e.textContent === 'Mass').click()")
    wait(browser, "location.search.includes('sort=mass') && document.readyState === 'complete'")
    assert sorted(browser.evaluate(SHOWN)) == sorted(found)
    assert browser.evaluate("document.querySelector('[aria-sort]').textContent.trim()") == "Mass"
    address = browser.evaluate("location.href")
    order = browser.evaluate(SHOWN)
    browser.open(address)
    assert browser.evaluate(SHOWN) == order
    assert browser.evaluate("document.querySelector('input[type=search]').value") == shown_id


def test_a_point_of_the_map_and_a_neighbour_lead_to_components(browser: Browser, server: LiveServer) -> None:
    browser.open(server.address)
    browser.evaluate("document.querySelector('.map a[href=\"/component/7\"]').dispatchEvent(new MouseEvent('click'))")
    wait(browser, "location.pathname === '/component/7' && document.readyState === 'complete'")
    assert browser.evaluate("document.querySelectorAll('.histogram rect').length") > 5
    browser.evaluate("document.querySelector('.neighbours a').click()")
    wait(browser, "location.pathname !== '/component/7' && location.pathname.startsWith('/component/')")


def test_a_query_is_asked_by_its_form(browser: Browser, server: LiveServer) -> None:
    browser.open(server.address)
    browser.open(f"http://127.0.0.1:{server.port}/query")
    browser.evaluate("document.querySelector('textarea').value = 'select 6 * 7 as answer'")
    browser.evaluate("document.querySelector('form[action=\"/query/sql\"] button').click()")
    wait(browser, "location.pathname === '/query/sql' && document.readyState === 'complete'")
    assert browser.evaluate("document.querySelector('#answer td').textContent") == "42"
    browser.open(f"http://127.0.0.1:{server.port}/report#component-3")
    assert browser.evaluate("document.querySelectorAll('.card').length") == 12
    assert browser.complaints == []


def test_without_scripts_the_forms_work(browser: Browser, server: LiveServer, shown_id: str) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(server.address)
        browser.evaluate(f"document.querySelector('input[type=search]').value = '{shown_id}'")
        browser.evaluate("document.querySelector('form button').click()")
        wait(browser, f"location.search.includes('q={shown_id}') && document.readyState === 'complete'")
        assert 0 < len(browser.evaluate(SHOWN)) < 12
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_names_are_edited_on_the_page(browser: Browser, make_run) -> None:
    path = make_run(n_components=4).path
    for server in running(path, edit=True):
        browser.open(server.address)
        browser.open(f"http://127.0.0.1:{server.port}/component/1")
        browser.evaluate("document.querySelector('input[name=name]').value = '<b>round</b> digits'")
        browser.evaluate("document.querySelector('form.stacked button').click()")
        wait(browser, "document.readyState === 'complete' && document.querySelector('.given') !== null")
        assert browser.evaluate("document.querySelector('.given').textContent") == "<b>round</b> digits"
        assert browser.complaints == []


def test_the_components_of_an_example_fit_their_panel(browser: Browser, make_run) -> None:
    path = make_run(n_components=4).path
    named = {number: Annotation("a name of many words " * 2, None) for number in range(4)}
    write_annotations(ComponentStore.open(path).run, named)
    for server in running(path):
        browser.open(server.address)
        browser.open(f"http://127.0.0.1:{server.port}/example/3", width=1400)
        table = "document.querySelector('.scroll[aria-label=Components]')"
        assert browser.evaluate(f"{table}.scrollWidth <= {table}.clientWidth")


def test_the_lines_of_texts_are_kept(browser: Browser, tmp_path: Path) -> None:
    page = forms(View("run", None, 4), "sql", {}, 200, pa.table({"text": ["One.\nTwo.", "A " * 60 + "\nB"]}))
    sheet = style().content.decode()
    html = page.content.decode().replace('<link rel="stylesheet" href="/style.css">', f"<style>{sheet}</style>")
    (tmp_path / "answer.html").write_text(html)
    browser.open(tmp_path / "answer.html", width=1400)
    cells = browser.evaluate("[...document.querySelectorAll('#answer td')].map((e) => e.innerText)")
    assert cells[0] == "One.\nTwo."
    assert cells[1].endswith("\nB")
