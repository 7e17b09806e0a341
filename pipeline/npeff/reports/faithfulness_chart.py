"""The table `faithfulness` as one plot per metric and replacement, and as a table of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npeff.reports.charts import Axis

_ORDER = ("information", "insertion", "deletion"), ("resample", "given_the_rest", "mean")
"""Metrics and replacements in the order of the plots. The information with values of other examples is first."""
_LOW_IS_GOOD = ("deletion",)
_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 330.0, 162.0, 8.0, 6.0, 19.0


@dataclass(frozen=True)
class Dot:
    """The mean of one method with the ends of its 95% interval."""

    label: str
    x: float
    low_x: float
    high_x: float
    y: float
    ours: bool
    knows: bool
    """The method is made from the values that the test puts in place of inputs."""
    row: dict[str, Any]


@dataclass(frozen=True)
class FaithfulnessPlot:
    """The methods by one metric and replacement, the best first."""

    metric: str
    replacement: str
    low_is_good: bool
    n_examples: int
    width: float
    height: float
    axis: Axis
    dots: list[Dot]

    @property
    def left(self) -> float:
        return _LEFT

    @property
    def bottom(self) -> float:
        return _TOP + _ROW * len(self.dots)


@dataclass(frozen=True)
class Difference:
    """A cell of the table: the mean of a method, and our mean minus it."""

    row: dict[str, Any]
    verdict: str
    """ "better" or "worse" if the 95% interval shows that we are, otherwise empty."""


@dataclass(frozen=True)
class MethodRow:
    """A method in the table."""

    label: str
    ours: bool
    passes: float
    cells: list[Difference | None]
    """One for each plot."""


@dataclass(frozen=True)
class Faithfulness:
    """The comparison of the attributions."""

    plots: list[FaithfulnessPlot]
    methods: list[MethodRow]
    """In the order of the first plot."""

    @property
    def some_know(self) -> bool:
        return any(dot.knows for plot in self.plots for dot in plot.dots)


def faithfulness_plots(table: Sequence[dict[str, Any]]) -> Faithfulness | None:
    """Lay out the table `faithfulness`; None if it has no finite means."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table:
        if math.isfinite(row["mean"]):
            groups.setdefault((row["metric"], row["replacement"]), []).append(row)
    plots = [_plot(*key, groups[key]) for key in sorted(groups, key=_place)]
    if not plots:
        return None
    by_method: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for plot in plots:
        for dot in plot.dots:
            by_method.setdefault(dot.row["method"], {})[plot.metric, plot.replacement] = dot.row
    return Faithfulness(plots, [_method(found, plots) for found in by_method.values()])


def _place(key: tuple[str, str]) -> tuple[Any, ...]:
    """Return the place of a metric and replacement among the plots. Unknown ones are last."""
    places = [known.index(name) if name in known else len(known) for name, known in zip(key, _ORDER, strict=True)]
    return *places, *key


def _plot(metric: str, replacement: str, rows: Sequence[dict[str, Any]]) -> FaithfulnessPlot:
    low_is_good = metric in _LOW_IS_GOOD
    ordered = sorted(rows, key=lambda row: (row["mean"] if low_is_good else -row["mean"], row["method"]))
    ends = [(_finite(row["low"], row["mean"]), _finite(row["high"], row["mean"])) for row in ordered]
    low, high = min(0.0, *(low for low, _ in ends)), max(high for _, high in ends)
    axis = Axis(low, high + 0.04 * (high - low) if high > low else low + 1.0, _LEFT, _WIDTH - _RIGHT)
    dots = [
        Dot(
            label=_label(row),
            x=axis.position(row["mean"]),
            low_x=axis.position(ends[place][0]),
            high_x=axis.position(ends[place][1]),
            y=_TOP + _ROW * (place + 0.5),
            ours=_is_ours(row),
            knows=row["knows_replacement"],
            row=row,
        )
        for place, row in enumerate(ordered)
    ]
    height = _TOP + _ROW * len(dots) + 24
    return FaithfulnessPlot(metric, replacement, low_is_good, rows[0]["n_examples"], _WIDTH, height, axis, dots)


def _method(found: dict[tuple[str, str], dict[str, Any]], plots: Sequence[FaithfulnessPlot]) -> MethodRow:
    first = next(iter(found.values()))
    cells = [
        None if (row := found.get((plot.metric, plot.replacement))) is None else _difference(row, plot.low_is_good)
        for plot in plots
    ]
    return MethodRow(_label(first), _is_ours(first), first["passes_per_example"], cells)


def _difference(row: dict[str, Any], low_is_good: bool) -> Difference:
    low, high = row["difference_low"], row["difference_high"]
    if low is None or not (low > 0 or high < 0):
        return Difference(row, "")
    return Difference(row, "better" if (high < 0) == low_is_good else "worse")


def _is_ours(row: dict[str, Any]) -> bool:
    """Return whether the row is that of the functional Fisher information, with which the methods are compared."""
    return row["difference"] is None


def _label(row: dict[str, Any]) -> str:
    return str(row["method"]).replace("_", " ")


def _finite(value: float | None, other: float) -> float:
    return other if value is None or not math.isfinite(value) else value
