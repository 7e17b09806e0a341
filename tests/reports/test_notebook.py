"""What a notebook shows for a component, a store, a run and a configuration."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
from npeff import views
from npeff.query.components import ComponentStore
from npeff.reports.notebook import _nested_style
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory

HOSTILE = """<script>alert(1)</script>"'><img src=x onerror=alert(2)>"""
VOID = {"br", "wbr", "img", "input", "circle", "line", "path", "polyline", "rect"}


class Balanced(HTMLParser):
    """Raises where an element ends that has not begun, and tells those that do not end."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            while self.open.pop() != tag:  # HTML ends a row, a cell or an item of a list by itself
                pass


def parsed(html: str) -> Balanced:
    found = Balanced()
    found.feed(html)
    found.close()
    assert found.open == []
    return found


def test_a_component_is_shown_as_its_card(run) -> None:
    store = ComponentStore.open(run.path)
    html = store.component(3)._repr_html_()
    parsed(html)
    assert html.count('<article class="card"') == 1
    ids = store.component(3).top_examples(5, split="held_out")["id"].to_pylist()
    assert all(name in html for name in ids)
    assert html.count("data:image/png") == len(set(re.findall(r'class="image (i\d+)"', html)))


def test_a_view_has_no_script_and_loads_nothing(run) -> None:
    store = ComponentStore.open(run.path)
    for html in (store._repr_html_(), store.component(0)._repr_html_()):
        assert parsed(html).tags.isdisjoint({"script", "link", "iframe", "object"})
        assert "<a " not in html, "the other parts of the report are not on the page"
        assert re.findall(r"https?://|@import| src=", html) == []


def test_the_style_of_a_view_is_nested_in_its_class_and_has_no_rule_for_the_page(run) -> None:
    html = ComponentStore.open(run.path).component(0)._repr_html_()
    (scope,) = re.findall(r'<div class="npeff (npeff-\w+)">', html)
    (style,) = re.findall(r"<style>\n(.*?)</style>", html, re.DOTALL)
    assert style.startswith(f".{scope} {{")
    depths = [
        style[: match.start()].count("{") - style[: match.start()].count("}") for match in re.finditer("{", style)
    ]
    assert depths[0] == 0
    assert min(depths[1:]) == 1
    assert ":root" not in _nested_style()
    assert not re.search(r"^\s*body\b", _nested_style(), re.MULTILINE)


def test_views_on_one_page_have_classes_of_their_own(run) -> None:
    store = ComponentStore.open(run.path)
    shown = [store._repr_html_(), store.component(0)._repr_html_(), store.component(1)._repr_html_()]
    assert len({re.findall(r"npeff-\w+", html)[0] for html in shown}) == 3


def test_texts_of_the_data_are_escaped(make_run: Callable) -> None:
    store = ComponentStore.open(make_run(n_components=4, hostile_text=HOSTILE).path)
    for html in (store._repr_html_(), store.component(0)._repr_html_()):
        assert "<img" not in html
        assert "<script" not in html


def test_a_store_shows_the_run_and_its_components(run) -> None:
    html = ComponentStore.open(run.path)._repr_html_()
    assert parsed(html).tags >= {"table", "dl"}
    assert "240 fit, 118 held out, 2 invalid" in html
    assert html.count("<tr>") == 13


def test_a_store_without_components_is_shown(make_run: Callable) -> None:
    run = make_run()
    for name in ("components", "verification", "top_examples"):
        next(run.path.rglob(f"{name}.parquet")).unlink()
    html = ComponentStore.open(run.path)._repr_html_()
    assert "240 fit" in html
    assert "<th>component</th>" not in html


def test_a_configuration_is_shown_as_its_file(tmp_path) -> None:
    settings = {"run_dir": "runs/<b>", "task": {"name": "digits"}, "factorization": {"n_components": 3}}
    html = RunConfig.model_validate(settings)._repr_html_()
    assert parsed(html).tags == {"details", "summary", "code", "pre"}
    assert "run_dir: runs/&lt;b&gt;" in html
    run = RunDirectory.create(RunConfig.model_validate(settings | {"run_dir": str(tmp_path / "<i>")}))
    html = run._repr_html_()
    assert parsed(html).tags == {"div", "code", "table", "thead", "tbody", "tr", "th", "td"}
    assert "&lt;i&gt;" in html
    assert html.count(">missing<") == len(re.findall("<tr>", html)) - 1


def test_a_notebook_shows_the_card_itself(run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[object] = []
    monkeypatch.setattr("npeff.query.component.in_notebook", lambda: True)
    monkeypatch.setattr("npeff.query.component.show_in_notebook", shown.append)
    component = ComponentStore.open(run.path).component(2)
    component.show()
    assert shown == [component]


def test_this_process_is_no_notebook() -> None:
    assert not views.in_notebook()
