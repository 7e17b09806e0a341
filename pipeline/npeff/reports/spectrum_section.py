"""The section of the report about the spectrum of the mean Fisher: its curves, and the table of statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from npeff.query.components import ComponentStore
from npeff.reports.charts import Axis

_POINTS = 160
"""Largest number of points of a curve."""
_DECADES = 8
"""Decades of eigenvalues that the plot shows."""
_LAYERS = 12
"""Largest number of layers in the table."""

_TITLES = {
    "directions_90": "Directions for 90%",
    "directions_99": "Directions for 99%",
    "effective_rank": "Effective rank",
    "participation_ratio": "Participation ratio",
    "effective_parameters_1": "Parameters above α = 1",
    "effective_parameters_100": "Parameters above α = 100",
    "local_effective_dimension": "Effective dimension",
    "trace": "Trace",
    "largest": "Largest eigenvalue",
    "mean_eigenvalue": "Mean eigenvalue",
    "mean_squared_eigenvalue": "Mean squared eigenvalue",
    "mean_squared_norm": "Mean squared norm",
    "cap": "Cap of every rank",
}
_WHOLE = ("directions_90", "directions_99", "cap")
"""Statistics that are whole numbers."""


@dataclass(frozen=True)
class SpectrumChart:
    """The eigenvalues and their cumulative share of the trace by index, from 1."""

    width: float
    height: float
    axis_index: Axis
    axis_eigenvalue: Axis
    axis_share: Axis
    eigenvalues: str
    """Points of the curve of the eigenvalues."""
    shares: str
    """Points of the curve of the shares."""
    rank_x: float
    """Position of the effective rank."""


@dataclass(frozen=True)
class StatisticRow:
    title: str
    value: float | int | None
    low: float | None
    high: float | None
    fewer: list[float | int | None]
    """The statistic of fewer examples, as in `SpectrumSection.n_fewer`."""


@dataclass(frozen=True)
class SpectrumSection:
    headline: str | None
    """None if there are no eigenvalues."""
    not_computed: str | None
    chart: SpectrumChart | None
    rows: list[StatisticRow]
    n_examples: int
    n_fewer: list[int]
    n_parameters: int
    labels: str
    cap: int
    layers: list[dict[str, Any]]
    """Trace of each layer and its share, the largest first."""
    n_layers: int


def spectrum_section(store: ComponentStore) -> SpectrumSection | None:
    """Return the section; None if the stage `spectrum` has not run."""
    if not all(store.tables.has(name) for name in ("spectrum", "spectrum_statistics")):
        return None
    statistics, record = store.table("spectrum_statistics").to_pylist(), store.tables.record("spectrum")
    of_all = [row for row in statistics if row["parameter_group"] is None]
    by_size: dict[int, dict[str, dict[str, Any]]] = {}
    for row in of_all:
        by_size.setdefault(row["n_examples"], {})[row["name"]] = row
    n_examples = max(by_size)
    n_fewer = sorted(by_size.keys() - {n_examples})
    found = by_size[n_examples]
    layers = _layers([row for row in statistics if row["parameter_group"] is not None])
    return SpectrumSection(
        headline=_headline(found, record.get("n_parameters")),
        not_computed=record.get("not_computed"),
        chart=_chart(store, found),
        rows=[_row(name, found, [by_size[size] for size in n_fewer]) for name in _TITLES if name in found],
        n_examples=n_examples,
        n_fewer=n_fewer,
        n_parameters=record.get("n_parameters", 0),
        labels=of_all[0]["labels"],
        cap=int(found["cap"]["value"]),
        layers=layers[:_LAYERS],
        n_layers=len(layers),
    )


def cumulative_curve(store: ComponentStore) -> tuple[NDArray[np.float64], float | None]:
    """Return the share of the trace in the first 1, 2, ... directions, and the effective rank; nothing if unknown."""
    if not all(store.tables.has(name) for name in ("spectrum", "spectrum_statistics")):
        return np.empty(0), None
    shares_D = store.table("spectrum")["cumulative"].drop_null().to_numpy()
    return shares_D, store.tables.record("spectrum").get("effective_rank")


def _headline(found: dict[str, dict[str, Any]], n_parameters: int | None) -> str | None:
    n_directions = found["directions_90"]["value"]
    if n_directions is None or n_parameters is None:
        return None
    verb = "direction holds" if n_directions == 1 else "directions hold"
    return f"{n_directions:,.0f} {verb} 90% of the information of {n_parameters:,} parameters"


def _row(name: str, found: dict[str, dict[str, Any]], fewer: Sequence[dict[str, dict[str, Any]]]) -> StatisticRow:
    row = found[name]

    def shown(value: float | None) -> float | int | None:
        return int(value) if value is not None and name in _WHOLE else value

    others = [shown(each[name]["value"]) if name in each else None for each in fewer]
    return StatisticRow(_TITLES[name], shown(row["value"]), row["low"], row["high"], others)


def _layers(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    total = sum(row["value"] for row in rows)
    named = [
        {"layer": row["parameter_group"], "trace": row["value"], "share": row["value"] / total if total > 0 else None}
        for row in rows
    ]
    return sorted(named, key=lambda row: -row["trace"])


def _chart(store: ComponentStore, found: dict[str, dict[str, Any]]) -> SpectrumChart | None:
    """Lay out the curves; None if there are fewer than two positive eigenvalues."""
    table = store.table("spectrum")
    eigenvalues_D, rank = table["eigenvalue"].to_numpy(), found["effective_rank"]["value"]
    if rank is None or (n_positive := int((eigenvalues_D > eigenvalues_D[0] * 10.0**-_DECADES).sum())) < 2:
        return None
    shares_D = table["cumulative"].to_numpy()
    width, height = 560.0, 360.0
    low, high = float(eigenvalues_D[n_positive - 1]), float(eigenvalues_D[0])
    axis_index = Axis(1, n_positive, 62, width - 56, log=True)
    axis_eigenvalue = Axis(low, high * 1.2, height - 44, 14, log=True)
    axis_share = Axis(0.0, 1.0, height - 44, 14)
    indices = np.unique(np.geomspace(1, n_positive, _POINTS).round().astype(int))

    def line(axis: Axis, values_D: NDArray[np.float64]) -> str:
        return " ".join(f"{axis_index.position(i)},{axis.position(float(values_D[i - 1]))}" for i in indices.tolist())

    return SpectrumChart(
        width=width,
        height=height,
        axis_index=axis_index,
        axis_eigenvalue=axis_eigenvalue,
        axis_share=axis_share,
        eigenvalues=line(axis_eigenvalue, eigenvalues_D),
        shares=line(axis_share, shares_D),
        rank_x=axis_index.position(rank),
    )
