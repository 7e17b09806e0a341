"""Queries by a person: the page of the forms with the result of a query, and the report.

`answer` computes a page. It runs in a process of its own for each request (see `npeff.live.limits`) and opens the run
again, so that the page shows the current state of the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Set
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from npeff.errors import hide_value_of, without_values
from npeff.live.pages import HTML, Page, View
from npeff.live.templates import page
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.reports.input_evidence import InputEvidence, InputReader, Shown
from npeff.reports.pictures import Album
from npeff.reports.report import render_report
from npeff.storage import objects
from npeff.storage.location import is_remote

REPORT = "report"

ROWS_SHOWN = 500
"""Largest number of rows of a result."""

_CHARACTERS_SHOWN = 2000
"""Largest number of characters of one value of a result."""

MODULES = (
    __name__,
    "npeff.live.preloaded",
    "npeff.query.filters",
    "npeff.query.enrichment",
    "npeff.query.sql",
    "npeff.store.component_store",
    "pyarrow.dataset",
    "scipy.stats",
)
"""The modules that pages need."""


@dataclass(frozen=True)
class Drawn:
    """An example above the result, with the information in its inputs."""

    example: int
    id: str
    text: str | None
    inputs: InputEvidence


def answer(view: View, question: str, asked: dict[str, str], known: str) -> bytes:
    """Return a page as bytes.

    Args:
        view: What is served.
        question: One of `QUESTIONS`, or `REPORT`.
        asked: The parameters of the query.
        known: State of the run of which the caller has the report. The report is not rendered again for this state.
    """
    for name in view.hidden:
        hide_value_of(name)
    try:
        return _page(view, question, asked, known).to_bytes()
    except QueryError as error:
        return forms(view, question, asked, HTTPStatus.BAD_REQUEST, problem=without_values(str(error))).to_bytes()


def _page(view: View, question: str, asked: dict[str, str], known: str) -> Page:
    store = ComponentStore.open(view.run_dir, view.factorization)
    if question == REPORT:
        state = state_of(store)
        if view.beside is not None:
            state += state_of(ComponentStore.open(view.beside))
        content = b"" if state == known else render_report(store, view.top_examples, view.beside).encode()
        return Page(HTTPStatus.OK, HTML, content, state)
    return result(store, view, question, asked)


def is_fixed(question: str, asked: dict[str, str]) -> bool:
    """Return whether the cost of a query is known: it contains no SQL, and is about one component or example."""
    return question in ("top", "example", "similar") and not asked.get("where")


def result(store: ComponentStore, view: View, question: str, asked: dict[str, str]) -> Page:
    """Return the page of a query with its result. Arguments and errors are those of `answer`, with an open store."""
    found = QUESTIONS[question](store, asked)
    pictured = _pictured(store, found) if question == "top" else set()
    drawn = _drawn(store, asked["example"]) if question == "inputs" and asked.get("example") else None
    return forms(view, question, asked, HTTPStatus.OK, found, pictured, drawn)


def forms(
    view: View,
    question: str,
    asked: dict[str, str],
    status: HTTPStatus,
    found: pa.Table | None = None,
    pictured: Set[int] = frozenset(),
    drawn: Drawn | None = None,
    problem: str = "",
) -> Page:
    """Return the page with the query forms, the current query, and its result or error."""
    return page(
        "query.html.j2",
        status,
        view=view,
        question=question,
        asked=asked,
        problem=problem,
        pictured=pictured,
        drawn=drawn,
        most_rows=ROWS_SHOWN,
        **_shown(found),
    )


def state_of(store: ComponentStore, *, annotations: bool = True) -> str:
    """Return a text that changes with every file that the report reads.

    The stores are not looked at: each belongs to the record of a stage.

    Args:
        store: The store.
        annotations: Whether names and notes count.
    """
    run = store.run
    facts: list[str] = []
    for folder in dict.fromkeys((run.path, run.home)):
        if is_remote(folder):
            found = objects.files(folder / "tables") | objects.files(folder / "stages")
            facts += [f"{name} {each['e_tag']} {each['last_modified']}" for name, each in sorted(found.items())]
            continue
        for pattern in ("*.yaml", "*.json", "tables/*.parquet", "stages/*.json"):
            for file in sorted(folder.glob(pattern)):
                if file == run.annotations and not annotations:
                    continue
                stat = file.stat()
                facts.append(f"{file} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _top(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    split, where = asked.get("split") or None, asked.get("where") or None
    return store.top_examples(whole(asked, "component"), _number(asked, 20), split, where)


def _enriched(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.enriched(asked.get("where", ""), split=asked.get("split") or None)


def _example(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.example(asked.get("example", ""))


def _inputs(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    component = whole(asked, "component") if asked.get("component") else None
    example = asked.get("example") or None
    if example is None and component is None:
        raise QueryError("give an example or a component")
    return store.inputs(example, component)


def _similar(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.similar_components(whole(asked, "component"), _number(asked, 10))


def _sql(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.sql(asked.get("query", ""), most_rows=ROWS_SHOWN + 1)


QUESTIONS: dict[str, Callable[[ComponentStore, dict[str, str]], pa.Table]] = {
    "top": _top,
    "enriched": _enriched,
    "example": _example,
    "inputs": _inputs,
    "similar": _similar,
    "sql": _sql,
}


def whole(asked: dict[str, str], name: str, default: int | None = None) -> int:
    """Return a parameter that is a whole number. Raises `QueryError` if it is something else."""
    text = asked.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > 12:
        raise QueryError(f"{name} must be a whole number, not '{text}'")
    return int(text)


def _number(asked: dict[str, str], default: int) -> int:
    if (n := whole(asked, "n", default)) > ROWS_SHOWN:
        raise QueryError(f"n must be at most {ROWS_SHOWN}", "use `npeff query` for longer results")
    return n


def _pictured(store: ComponentStore, found: pa.Table) -> set[int]:
    """Return the examples of the result that have an image."""
    where = pc.field("example").isin(found["example"].combine_chunks()) & pc.field("image").is_valid()
    return set(store.tables.read("examples", ["example"], where)["example"].to_pylist())


def _drawn(store: ComponentStore, asked: str) -> Drawn | None:
    """Return an example with the information in its inputs; None if it is neither an image nor tokens."""
    example = store.example_number(asked)
    row = store.tables.read("examples", ["id", "text", "image"], pc.field("example") == example).to_pylist()[0]
    image = Album({example: row["image"]}).image(example)
    found = InputReader(store.tables, store.class_names(), {example: Shown(row["text"], image)}).evidence(example)
    if found is None or found.shares is None:
        return None
    return Drawn(example, row["id"], row["text"], found)


def _shown(found: pa.Table | None) -> dict[str, Any]:
    """Return the first rows of a result, without empty columns."""
    if found is None:
        return {"columns": None, "rows": [], "n_rows": 0}
    names = [name for name in found.column_names if found[name].null_count < len(found)] or found.column_names
    rows = found.select(names).slice(0, ROWS_SHOWN).to_pylist()
    return {"columns": names, "rows": [[_cut(row[name]) for name in names] for row in rows], "n_rows": len(found)}


def _cut(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | bytes):
        return value
    text = str(value)
    return text if len(text) <= _CHARACTERS_SHOWN else text[: _CHARACTERS_SHOWN - 1] + "…"
