"""The report of a run: one self-contained HTML file, for complete and incomplete runs.

The file contains its styles, script and images, and loads nothing else. Its content security policy forbids every
request and every script except its own, for any text in the data set.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from npeff.errors import without_values
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.query.factorizations import factorizations_of
from npeff.reports.cards import Card, CardWriter
from npeff.reports.charts import full_width, log_axis, loss_chart, ratio_chart
from npeff.reports.comparison import Comparison, comparison
from npeff.reports.groups_beside import GroupsBeside, groups_beside
from npeff.reports.scale_section import scale_section
from npeff.reports.selection_chart import SelectionChart, selection_chart
from npeff.reports.selectivity_chart import SIDE, selectivity_charts
from npeff.reports.spectrum_section import cumulative_curve, spectrum_section
from npeff.reports.texts import breakable, on_one_line, parts, visible
from npeff.statistics.joint_ablation import joint_ablations
from npeff.statistics.verdict import LEAST_MATCHED, MOST_TRACE_RATIO, Verdict, scoreboard, verdicts
from npeff.storage.atomic import write_file_atomically

CARDS_AT_ONCE = 64
"""With more components than this, a card is added to the page when it is about to be visible (see `report.js`)."""

_CHECKSUM = re.compile(r"[0-9a-f]{16,}(-[0-9a-f]{8,})?")
_MOST_LISTED = 16
"""Largest number of list items to show from a stage's record, such as the lifted components."""


@dataclass(frozen=True)
class Links:
    """Addresses to which the parts of a card link."""

    overview: str
    """The table of the components."""
    component: Callable[[int], str]
    """The card of a component."""
    example: Callable[[int], str] | None = None
    """The page of an example, by its row number; None if examples have no pages."""


def write_report(
    run_dir: str | Path, *, factorization: str | None = None, top_examples: int = 24, beside: str | None = None
) -> Path:
    """Write the report of a factorization, `report/index.html` in its folder, atomically and return its path.

    A section whose stage has not run yet shows the command that produces it.

    Args:
        run_dir: The run directory.
        factorization: Name of the factorization. The default is as in `ComponentStore.open`.
        top_examples: Largest number of held-out examples, and of fit examples, on a card. A row has up to twelve.
        beside: Directory of another run, whose groups of inputs are shown beside those of this run.

    Raises:
        QueryError: The path is not a run directory, a table is damaged, or the other run has no comparable groups.
        StoreError: The report cannot be written.
    """
    store = ComponentStore.open(run_dir, factorization)
    path = store.run.report
    page = render_report(store, top_examples, beside)
    write_file_atomically(path, lambda stream: stream.write(page.encode()))
    return path


def render_report(store: ComponentStore, top_examples: int, beside: str | None = None) -> str:
    """Return the report as HTML text. Arguments and errors are those of `write_report`."""
    templates = environment()
    script = templates.get_template("report.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return templates.get_template("report.html.j2").render(
        **_page(store, top_examples),
        beside=_beside(store, beside),
        script_hash=f"sha256-{digest}",
    )


@functools.cache  # compiling the templates takes half a second
def environment() -> jinja2.Environment:
    """Return the templates, which escape all values and raise an error for an unknown name."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("npeff.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"number": number, "percent": percent, "duration": duration, "ratio": ratio}
    templates.filters |= {
        "full_width": full_width,
        "parts": parts,
        "on_one_line": on_one_line,
        "visible": visible,
        "breakable": breakable,
    }
    templates.globals["links"] = Links(overview="#components", component=lambda number: f"#component-{number}")
    return templates


_FACTORIZED = {
    "diagonal_groups": "diagonal Fishers",
    "diagonal_entries": "diagonal Fishers",
    "gradients": "gradients of the predictions",
    "kmeans": "gradients of the predictions",
    "squared": "squared entries of the Fisher factors",
}
"""What the components explain, by the kind of the factorization."""


def _page(store: ComponentStore, top_examples: int) -> dict[str, Any]:
    """Return the variables of the template."""
    tables = store.tables
    found = verdicts(store.table("verification").to_pylist()) if tables.has("verification") else []
    scores = scoreboard(found)
    factorized = all(tables.has(name) for name in ("examples", "components", "top_examples"))
    provenance = tables.json("provenance.json")
    files = (store.run_dir / "run.yaml", store.run.settings)
    configuration = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    kind = tables.record("factorize").get("factorized", "fishers")
    writer = CardWriter(store, top_examples) if factorized else None
    cards = writer.cards() if writer is not None else []
    return {
        "title": without_values(store.run_dir.resolve().name),
        "run_dir": without_values(store.run.argument),
        "summary": store.summary(),
        "factorized": _FACTORIZED.get(kind, "Fisher matrices"),
        "stages": [_stage(name, record) for name, record in tables.stages().items()],
        "provenance": _flat(provenance),
        "configuration": "".join(configuration) or None,
        "loss": loss_chart(store.table("history").to_pylist()) if tables.has("history") else None,
        "selection": _selection(store) if tables.has("selection") else None,
        "selection_reason": tables.record("select").get("reason"),
        "scores": scores,
        "broken": [verdict for verdict in found if verdict.broken],
        "failure": next((score.failure for score in scores), None),
        "least_matched": LEAST_MATCHED,
        "most_trace_ratio": MOST_TRACE_RATIO,
        "ratio_charts": _ratio_charts(found),
        "selectivity": selectivity_charts(store.table("selectivity")) if tables.has("selectivity") else [],
        "selectivity_error": tables.record("verify").get("selectivity_error"),
        "selectivity_side": SIDE,
        "removals": joint_ablations(store.table("joint_ablation").to_pylist()) if tables.has("joint_ablation") else [],
        "comparison": _comparison(store),
        "spectrum": spectrum_section(store),
        "scale": scale_section(store),
        "stability": _stability(cards),
        "cards": cards,
        "lazy": len(cards) > CARDS_AT_ONCE,
        "images": writer.album.rules if writer is not None else {},
        "has_names": any(card.annotation.name for card in cards),
        "names_outdated": store.annotations.outdated,
        "has_common": any(card.common.leading for card in cards),
        "has_shares": tables.has("position_shares") and tables.n_rows("position_shares") > 0,
        "inputs": writer.inputs if writer is not None else None,
        **card_variables(store, cards, found),
    }


def card_variables(store: ComponentStore, cards: Sequence[Card], found: Sequence[Verdict]) -> dict[str, Any]:
    """Return the variables of the template of a card that are the same for all cards.

    Args:
        store: The store.
        cards: All cards.
        found: The verdicts of all components.
    """
    tables = store.tables
    return {
        "diagonal": tables.record("factorize").get("factorized", "fishers").startswith("diagonal_"),
        "control_a": "Fisher norms" if found and found[0].informative is None else "traces",
        "strip": log_axis(_ratios(found), 6, 194),
        "has_inputs": any(card.has_inputs for card in cards),
        "metadata": store.metadata_columns() if tables.has("examples") else [],
    }


def _selection(store: ComponentStore) -> SelectionChart | None:
    shares_D, rank = cumulative_curve(store)
    return selection_chart(store.table("selection").to_pylist(), shares_D.tolist(), rank)


def _comparison(store: ComponentStore) -> Comparison | None:
    """Return the comparison of the factorizations of the run; None if they cannot be compared."""
    try:
        return comparison(factorizations_of(store.run_dir))
    except QueryError:  # a table of another factorization is damaged, which is told by its own report
        return None


def _beside(store: ComponentStore, other: str | None) -> GroupsBeside | None:
    """Return the groups of inputs of two runs; None if this run has none yet."""
    if other is None or not store.tables.has("input_groups"):
        return None
    return groups_beside(store.tables, other)


def _stability(cards: list[Card]) -> tuple[float, int, int] | None:
    """Return the median stability, the number of components of at least 0.9, and the number with a known value."""
    known = [card.row["stability"] for card in cards if card.row.get("stability") is not None]
    known = [value for value in known if not math.isnan(value)]
    return (statistics.median(known), sum(value >= 0.9 for value in known), len(known)) if known else None


def _ratio_charts(found: list[Verdict]) -> list[Any]:
    """Return the plots of held-out and fit examples, in this order, with the same axis."""
    axis = log_axis(_ratios(found), 330, 14)
    charts = [ratio_chart(examples, found, axis) for examples in ("held_out", "fit")]
    return [chart for chart in charts if chart is not None]


def _ratios(found: Sequence[Verdict]) -> list[float | None]:
    return [value for v in found for value in (v.kl_ratio, v.norm_control, v.random_control, v.other_control)]


def _stage(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return the results of a stage, and its checksums apart."""
    facts = _flat({key: value for key, value in record.items() if key not in ("stage", "seconds")})
    checksums = {key: value for key, value in facts.items() if _CHECKSUM.fullmatch(value)}
    results = {key: value for key, value in facts.items() if key not in checksums}
    return {"name": name, "seconds": record.get("seconds"), "facts": results, "checksums": checksums}


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested JSON to dotted names and text. Lists of records are left out, because they are in tables."""
    flat: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            flat[prefix + key] = number(value)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            continue
        elif isinstance(value, list):
            shown = [str(item) for item in value[:_MOST_LISTED]] + (["…"] if len(value) > _MOST_LISTED else [])
            flat[prefix + key] = ", ".join(shown) or "none"
        else:
            flat[prefix + key] = "–" if value is None else str(value)
    return flat


def number(value: float | None) -> str:
    """Format a number with about three significant digits, or a dash for a missing value."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 1e7 and not isinstance(value, int):
        return f"{value:.1e}".replace("e+", "e").replace("-", "−")
    if isinstance(value, int) or size >= 100:
        return f"{value:,.0f}".replace("-", "−")
    if size == 0:
        return "0"
    if size < 0.001:
        return f"{value:.1e}".replace("-", "−")
    digits = 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}".replace("-", "−")


def ratio(value: float | None) -> str:
    """Format a ratio with a times sign."""
    text = number(value)
    return text if text == "–" else f"{text}×"


def percent(value: float | None, digits: int = 0) -> str:
    """Format a fraction as a percentage, or a dash for a missing value."""
    return "–" if value is None or math.isnan(value) else f"{100 * value:.{digits}f}%".replace("-", "−")


def duration(seconds: float | None) -> str:
    """Format seconds as seconds, minutes or hours."""
    if seconds is None or math.isnan(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
