"""The views of a component and of a store in a notebook, made with the templates and the style sheet of the report.

A view contains its style, which is nested in a class of its own (CSS nesting), so that it changes nothing else on the
page. It contains no script and loads nothing. All values are escaped by the templates.
"""

from __future__ import annotations

import functools
import hashlib
import re
import weakref
from typing import Any

from markupsafe import Markup

from npeff.errors import without_values
from npeff.query.component import Component
from npeff.query.components import ComponentStore
from npeff.reports.cards import Card, CardWriter
from npeff.reports.charts import log_axis
from npeff.reports.report import environment
from npeff.statistics.verdict import scoreboard, verdicts

_EXAMPLES_SHOWN = 12
"""Largest number of held-out examples, and of fit examples, on a card in a notebook."""

_ROWS_SHOWN = 12
_COLUMNS = ("component", "n_active", "stability", "kl_ratio_matched_held_out", "best_control_held_out")

_LINK = re.compile(r'<a href="#[^>]*>(.*?)</a>', re.DOTALL)
"""A link to another part of the report, which a notebook does not have."""

_ROOT = re.compile(r"(?<![\w.#-])(:root|body)(?= \{)")
_EXTRA_STYLE = """
/* The page has styles of its own for tables and lists. Its width may be a part of that of the window. */
& { margin: 8px 0; border-radius: 10px; white-space: normal; text-align: left; container-type: inline-size; }
table { table-layout: auto; margin: 0; border: 0; }
tbody tr:nth-child(n) { background: none; }
:is(ol, ul, dl) :is(li, dt, dd) { margin-left: 0; }
:is(ol, ul) { margin-left: 0; }
dt { font-weight: 400; }
.card { margin: 0; }
.steps { display: none; }
header + .facts { margin-top: 12px; }
@container (max-width: 860px) {
  .body { grid-template-columns: minmax(0, 1fr); }
}
@container (max-width: 640px) {
  .texts li { grid-template-columns: 56px 1fr; }
  .texts .text { grid-column: 1 / -1; }
}
"""

_writers: weakref.WeakKeyDictionary[ComponentStore, CardWriter] = weakref.WeakKeyDictionary()


def component_html(component: Component) -> str:
    """Return the card of a component as HTML.

    Raises:
        QueryError: A table is missing or damaged.
    """
    store = component.store
    card = _writer(store).card(component.number)
    tables = store.tables
    found = verdicts(tables.read("verification").to_pylist()) if tables.has("verification") else []
    ratios = [value for v in found for value in (v.kl_ratio, v.norm_control, v.random_control, v.other_control)]
    rules = _writer(store).album.rules
    images = [example.image.name for example in card.examples + card.contrast if example.image is not None]
    return _rendered(
        store,
        images={name: rules[name] for name in images},
        card=card,
        previous=None,
        following=None,
        lazy=False,
        metadata=store.metadata_columns(),
        has_inputs=card.has_inputs,
        diagonal=str(tables.record("factorize").get("factorized", "")).startswith("diagonal_"),
        strip=log_axis(ratios, 6, 194),
        scores=scoreboard(found),
        control_a="Fisher norms" if found and found[0].informative is None else "traces",
    )


def store_html(store: ComponentStore) -> str:
    """Return a summary of a run, and its first components, as HTML.

    Raises:
        QueryError: A table is damaged.
    """
    table = store.components_table() if store.tables.has("components") else None
    columns = [
        name
        for name in _COLUMNS
        if table is not None and name in table.column_names and table[name].null_count < len(table)
    ]
    return _rendered(
        store,
        images={},
        card=None,
        summary=store.summary(),
        title=without_values(store.run_dir.resolve().name),
        columns=columns,
        components=table.select(columns).slice(0, _ROWS_SHOWN).to_pylist() if table is not None else [],
    )


def _writer(store: ComponentStore) -> CardWriter:
    """Return the writer of the cards of a store, which reads the tables once."""
    if store not in _writers:
        # The writer keeps a store of its own: a value that refers to its key would never be released.
        _writers[store] = CardWriter(ComponentStore(store.run), _EXAMPLES_SHOWN)
    return _writers[store]


def _rendered(store: ComponentStore, *, images: dict[str, str], card: Card | None, **values: Any) -> str:
    argument = store.run.argument
    # Each view has a class of its own: the rules of one must not take away the images of another.
    named = argument if card is None else f"{argument} {card.component}"
    scope = "npeff-" + hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    pictures = "\n".join(f".{name} {{ background-image: url({uri}); }}" for name, uri in images.items())
    style = Markup(f".{scope} {{\n{_nested_style()}{_EXTRA_STYLE}{pictures}\n}}")  # noqa: S704  # no text of the data
    template = environment().get_template("notebook.html.j2")
    html = template.render(scope=scope, style=style, card=card, run_dir=without_values(argument), **values)
    return _LINK.sub(r"\1", html)


@functools.cache
def _nested_style() -> str:
    """Return the style sheet of the report with the rules of the page as rules of the view."""
    return _ROOT.sub("&", environment().get_template("report.css").render())
