"""The comparison of the factorizations of a run: a table and a figure, in the report and on a page of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npeff.query.errors import QueryError
from npeff.query.factorizations import Factorization, factorizations_of
from npeff.reports.charts import Axis, log_axis
from npeff.statistics.verdict import Scores, Verdict
from npeff.storage.atomic import write_file_atomically
from npeff.storage.location import location

_ROW_HEIGHT = 34
_LEFT, _WIDTH = 180, 1120


@dataclass(frozen=True)
class Mark:
    """The KL ratio of one component."""

    x: float
    verdict: Verdict
    name: str | None = None
    """Name of the component."""


@dataclass(frozen=True)
class Line:
    """A factorization in the table and in the figure."""

    facts: dict[str, Any]
    scores: Scores
    interval: tuple[float, float] | None
    y: float
    marks: list[Mark]
    median_x: float | None
    low_x: float | None
    high_x: float | None


@dataclass(frozen=True)
class Comparison:
    """The verified factorizations of a run, on a common logarithmic axis of KL ratios."""

    examples: str
    lines: list[Line]
    axis: Axis
    width: float
    height: float

    @property
    def one_x(self) -> float:
        return self.axis.position(1.0)


def comparison(factorizations: Sequence[Factorization]) -> Comparison | None:
    """Lay out the comparison of the factorizations that are verified with matched baselines.

    Returns:
        The comparison, of held-out examples if there are any; None if there are fewer than two such factorizations.
    """
    found = [(each, scores) for each in factorizations for scores in each.scores[:1] if scores.sign is None]
    if len(found) < 2:
        return None
    rows = [each.counted(scores) for each, scores in found]
    axis = log_axis([row.kl_ratio for group in rows for row in group], _LEFT, _WIDTH - 20)
    lines = []
    for number, ((each, scores), group) in enumerate(zip(found, rows, strict=True)):
        interval, known = each.interval(scores), each.store.annotations
        ends = (scores.median_kl_ratio, *(interval or (None, None)))
        lines.append(
            Line(
                each.facts,
                scores,
                interval,
                (number + 0.5) * _ROW_HEIGHT,
                [Mark(axis.position(row.kl_ratio or 0.0), row, known.name(row.component)) for row in group],
                *(None if value is None else axis.position(value) for value in ends),
            )
        )
    return Comparison(found[0][1].examples, lines, axis, _WIDTH, len(lines) * _ROW_HEIGHT + 46)


def write_comparison(run_dir: str | Path, path: str | Path) -> Path:
    """Write a page that compares the factorizations of a run, atomically, and return its path.

    Args:
        run_dir: The run directory.
        path: The HTML file.

    Raises:
        QueryError: The directory is not a run directory, or fewer than two of its factorizations are verified.
        StoreError: The page cannot be written.
    """
    from npeff.reports.report import environment  # which shows the comparison in the report

    found = factorizations_of(run_dir)
    compared = comparison(found)
    if compared is None:
        raise QueryError(
            f"fewer than two factorizations of {run_dir} are verified", f"run `npeff verify {run_dir}` for each of them"
        )
    title = str(found[0].store.tables.json("provenance.json").get("task") or "comparison")
    page = environment().get_template("comparison.html.j2").render(title=title, comparison=compared)
    written = location(path)
    write_file_atomically(written, lambda stream: stream.write(page.encode()))
    return written
