"""The pages of the live view: the query forms with the result of a query, the report, its style, and images.

`answer` computes a page. It runs in a process of its own for each request (see `npeff.reports.limits`) and opens the
run again, so that the page shows the current state of the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from npeff.errors import hide_value_of, without_values
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.reports.input_evidence import InputEvidence, InputReader, Shown
from npeff.reports.pictures import Album
from npeff.reports.report import environment, render_report
from npeff.storage import objects
from npeff.storage.location import is_remote

ROWS_SHOWN = 500
"""Largest number of rows of a result."""

_CHARACTERS_SHOWN = 2000
"""Largest number of characters of one value of a result."""

HTML, TEXT = "text/html; charset=utf-8", "text/plain; charset=utf-8"

MODULES = (__name__, "npeff.query.filters", "npeff.query.enrichment", "npeff.store.component_store", "pyarrow.dataset")
"""The modules that pages need."""


@dataclass(frozen=True)
class View:
    """What is served."""

    run_dir: str
    factorization: str | None
    top_examples: int
    beside: str | None = None
    """Directory of another run, whose groups of inputs are in the report."""
    hidden: frozenset[str] = frozenset()
    """Environment variables whose values are not shown."""


@dataclass(frozen=True)
class Page:
    """A response."""

    status: int
    kind: str
    content: bytes
    state: str = ""
    """For the report, a text that differs if the run has changed."""

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(replace(self, content=b"")), default=bytes.decode).encode() + b"\n" + self.content

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        facts, _, content = data.partition(b"\n")
        return cls(**{**json.loads(facts), "content": content})


@dataclass(frozen=True)
class Drawn:
    """An example above the result, with the information in its inputs."""

    example: int
    id: str
    text: str | None
    inputs: InputEvidence


def answer(view: View, path: str, asked: dict[str, str], known: str) -> bytes:
    """Return a page as bytes.

    Args:
        view: What is served.
        path: Path of the address.
        asked: The parameters of the query.
        known: State of the run of which the caller has the report. The report is not rendered again for this state.
    """
    for name in view.hidden:
        hide_value_of(name)
    try:
        return _page(view, path, asked, known).to_bytes()
    except QueryError as error:
        return forms(view, path, asked, HTTPStatus.BAD_REQUEST, problem=without_values(str(error))).to_bytes()


def _page(view: View, path: str, asked: dict[str, str], known: str) -> Page:
    store = ComponentStore.open(view.run_dir, view.factorization)
    if path == "/report":
        state = state_of(store)
        if view.beside is not None:
            state += state_of(ComponentStore.open(view.beside))
        content = b"" if state == known else render_report(store, view.top_examples, view.beside).encode()
        return Page(HTTPStatus.OK, HTML, content, state)
    if path == "/image":
        return _image(store, _whole(asked, "example"))
    found = QUESTIONS[path](store, asked)
    pictured = _pictured(store, found) if path == "/top" else set()
    drawn = _drawn(store, asked["example"]) if path == "/inputs" and asked.get("example") else None
    return forms(view, path, asked, HTTPStatus.OK, found, pictured, drawn)


def forms(
    view: View,
    path: str,
    asked: dict[str, str],
    status: HTTPStatus,
    found: pa.Table | None = None,
    pictured: Set[int] = frozenset(),
    drawn: Drawn | None = None,
    problem: str = "",
) -> Page:
    """Return the page with the query forms, the current query, and its result or error."""
    page = environment().get_template("serve.html.j2").render(
        run_dir=without_values(view.run_dir),
        path=path,
        asked=asked,
        problem=problem,
        pictured=pictured,
        drawn=drawn,
        most_rows=ROWS_SHOWN,
        **_shown(found),
    )  # fmt: skip
    return Page(status, HTML, page.encode())


def style() -> Page:
    """Return the style sheet of all pages but the report."""
    sheets = (environment().get_template(name).render() for name in ("report.css", "serve.css"))
    return Page(HTTPStatus.OK, "text/css; charset=utf-8", "".join(sheets).encode())


def state_of(store: ComponentStore) -> str:
    """Return a text that changes with every file that the report reads.

    The stores are not looked at: each belongs to the record of a stage.
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
                stat = file.stat()
                facts.append(f"{file} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode("utf-8", "surrogateescape")).hexdigest()


def _image(store: ComponentStore, example: int) -> Page:
    rows = store.tables.read("examples", ["image"], pc.field("example") == example)
    image = rows["image"][0].as_py() if len(rows) else None
    if image is None or not image.startswith(b"\x89PNG\r\n\x1a\n"):
        return Page(HTTPStatus.NOT_FOUND, TEXT, b"This example has no image.\n")
    return Page(HTTPStatus.OK, "image/png", image)


def _top(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    split, where = asked.get("split") or None, asked.get("where") or None
    return store.top_examples(_whole(asked, "component"), _number(asked, 20), split, where)


def _enriched(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.enriched(asked.get("where", ""), split=asked.get("split") or None)


def _example(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.example(asked.get("example", ""))


def _inputs(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    component = _whole(asked, "component") if asked.get("component") else None
    example = asked.get("example") or None
    if example is None and component is None:
        raise QueryError("give an example or a component")
    return store.inputs(example, component)


def _similar(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.similar_components(_whole(asked, "component"), _number(asked, 10))


def _sql(store: ComponentStore, asked: dict[str, str]) -> pa.Table:
    return store.sql(asked.get("query", ""), most_rows=ROWS_SHOWN + 1)


QUESTIONS: dict[str, Callable[[ComponentStore, dict[str, str]], pa.Table]] = {
    "/top": _top,
    "/enriched": _enriched,
    "/example": _example,
    "/inputs": _inputs,
    "/similar": _similar,
    "/sql": _sql,
}


def _whole(asked: dict[str, str], name: str, default: int | None = None) -> int:
    text = asked.get(name, "")
    if not text and default is not None:
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > 12:
        raise QueryError(f"{name} must be a whole number, not '{text}'")
    return int(text)


def _number(asked: dict[str, str], default: int) -> int:
    if (n := _whole(asked, "n", default)) > ROWS_SHOWN:
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
