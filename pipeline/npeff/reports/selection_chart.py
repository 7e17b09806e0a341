"""The plot of a search for the number of components: explained variance and reproducibility by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npeff.reports.charts import Axis

_SERIES = {
    "held_out": "explained variance, held-out examples",
    "share_back": "fraction of reproduced components",
    "cosine_halves": "mean |cos| of two halves",
    "silhouette": "mean silhouette",
}


@dataclass(frozen=True)
class Series:
    """A line of the plot with a point for every number of components."""

    name: str
    label: str
    points: list[tuple[float, float]]

    @property
    def line(self) -> str:
        return " ".join(f"{x},{y}" for x, y in self.points)


@dataclass(frozen=True)
class SelectionPoint:
    """The points and the tooltip of one number of components."""

    x: float
    n_components: int
    values: list[tuple[str, float]]
    """Name of each series, and y coordinate of its point."""
    row: dict[str, Any]


@dataclass(frozen=True)
class SelectionChart:
    """The layout of the plot. All series share one axis of fractions, which includes negative silhouettes."""

    width: float
    height: float
    x_axis: Axis
    y_axis: Axis
    series: list[Series]
    points: list[SelectionPoint]
    recommended: int
    recommended_x: float
    information: str | None = None
    """Points of the curve of the share of the trace in as many directions of the mean Fisher."""
    rank: float | None = None
    """The effective rank of the mean Fisher."""
    rank_x: float | None = None
    """Its position, if the axis contains it."""


def selection_chart(
    table: Sequence[dict[str, Any]],
    information: Sequence[float] = (),
    rank: float | None = None,
    width: float = 1120,
    height: float = 340,
) -> SelectionChart | None:
    """Lay out the table `selection`; None if the table is empty.

    Args:
        table: The rows.
        information: Share of the trace of the mean Fisher in its first 1, 2, ... directions; none if it is not known.
        rank: The effective rank of the mean Fisher.
        width: Width of the plot.
        height: Height of the plot.
    """
    rows = sorted(table, key=lambda row: row["n_components"])
    if not rows:
        return None
    shares = [_shares(row) for row in rows]
    low = min([0.0, *(value for of_row in shares for value in of_row.values())])
    numbers = [row["n_components"] for row in rows]
    x_axis = Axis(min(numbers) - 1, max(numbers) + 1, 62, width - 14)
    y_axis = Axis(low, 1.0, height - 44, 14)
    points = [
        SelectionPoint(
            x=x_axis.position(row["n_components"]),
            n_components=row["n_components"],
            values=[(name, y_axis.position(value)) for name, value in of_row.items()],
            row=row,
        )
        for row, of_row in zip(rows, shares, strict=True)
    ]
    series = [
        Series(name, label, [(point.x, y) for point in points for found, y in point.values if found == name])
        for name, label in _SERIES.items()
    ]
    recommended = next(row["n_components"] for row in rows if row["recommended"])
    counts = range(max(1, min(numbers) - 1), min(max(numbers) + 1, len(information)) + 1)
    return SelectionChart(
        width,
        height,
        x_axis,
        y_axis,
        series,
        points,
        recommended,
        x_axis.position(recommended),
        " ".join(f"{x_axis.position(n)},{y_axis.position(information[n - 1])}" for n in counts) or None,
        rank,
        x_axis.position(rank) if rank is not None and x_axis.low <= rank <= x_axis.high else None,
    )


def _shares(row: dict[str, Any]) -> dict[str, float]:
    """Return the value of each series. A single component has no silhouette."""
    values = {
        "held_out": row["explained_held_out"],
        "share_back": row["n_come_back"] / row["n_components"],
        "cosine_halves": row["cosine_halves"],
        "silhouette": row["silhouette_mean"],
    }
    return {name: value for name, value in values.items() if value is not None}
