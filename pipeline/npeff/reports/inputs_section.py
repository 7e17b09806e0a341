"""The section of the report about the inputs: how large the information is, and how it compares with its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npeff.query.tables import RunTables
from npeff.reports.charts import Axis
from npeff.reports.faithfulness_chart import Faithfulness, faithfulness_plots
from npeff.reports.input_groups import InputGroups, input_groups

POINTS_SHOWN = 500
_SIDE, _LEFT, _TOP, _RIGHT, _BOTTOM = 360.0, 56.0, 10.0, 10.0, 44.0
_SMALLEST = 1e-6
"""Smaller numbers of nats are drawn at the edge."""


@dataclass(frozen=True)
class InformationChart:
    """The information of each example against the entropy that it bounds, on equal logarithmic axes."""

    side: float
    x_axis: Axis
    y_axis: Axis
    points: list[tuple[float, float]]
    n_examples: int


@dataclass(frozen=True)
class InputsSection:
    """The content of the section."""

    n_examples: int
    n_invalid: int
    covariance: str | None
    information: tuple[float, float, float] | None
    """Quartiles, in nats; None if no example is finite."""
    ratio: float | None
    """Median of information ÷ entropy; None without entropies."""
    chart: InformationChart | None
    groups: InputGroups | None
    faithfulness: Faithfulness | None


def inputs_section(tables: RunTables, members: Mapping[int, Sequence[int]]) -> InputsSection | None:
    """Return the section about the inputs; None if the stage `inputs` has not run.

    Args:
        tables: The tables of the run.
        members: The top examples of each component.
    """
    if not tables.has("inputs"):
        return None
    information_N, entropy_N = _columns(tables, ("information", "entropy"))
    finite_N = np.isfinite(information_N)
    quartiles = np.quantile(information_N[finite_N], [0.25, 0.5, 0.75]).tolist() if finite_N.any() else None
    both_N = finite_N & np.isfinite(entropy_N)
    positive_N = both_N & (entropy_N > 0)
    ratios = information_N[positive_N] / entropy_N[positive_N]
    tested = tables.read("faithfulness").to_pylist() if tables.has("faithfulness") else []
    return InputsSection(
        n_examples=len(information_N),
        n_invalid=int((~finite_N).sum()),
        covariance=tables.record("inputs").get("covariance"),
        information=None if quartiles is None else (quartiles[0], quartiles[1], quartiles[2]),
        ratio=float(np.median(ratios)) if len(ratios) else None,
        chart=_chart(information_N[both_N], entropy_N[both_N]),
        groups=input_groups(tables, members),
        faithfulness=faithfulness_plots(tested),
    )


def _columns(tables: RunTables, names: Sequence[str]) -> list[NDArray[np.float64]]:
    """Return columns of the table `inputs`, NaN for null. Other columns are not read."""
    batches = list(tables.scan("inputs", names))
    return [
        np.concatenate([np.empty(0), *(batch[name].to_numpy(zero_copy_only=False).astype(float) for batch in batches)])
        for name in names
    ]


def _chart(information_N: NDArray[np.float64], entropy_N: NDArray[np.float64]) -> InformationChart | None:
    """Lay out the chart. Of many examples, some are drawn, at equal distances in the order of the table."""
    values = np.concatenate([information_N, entropy_N])
    values = np.maximum(values[values > 0], _SMALLEST)
    if not len(values):
        return None
    low, high = math.floor(np.log10(values.min())), math.ceil(np.log10(values.max()))
    ends = 10.0**low, 10.0 ** max(high, low + 1)
    x_axis = Axis(*ends, _LEFT, _SIDE - _RIGHT, log=True)
    y_axis = Axis(*ends, _SIDE - _BOTTOM, _TOP, log=True)
    n = len(information_N)
    chosen = np.unique(np.linspace(0, n - 1, min(n, POINTS_SHOWN)).round().astype(int)).tolist()
    points = [(x_axis.position(entropy_N[i]), y_axis.position(information_N[i])) for i in chosen]
    return InformationChart(_SIDE, x_axis, y_axis, points, n)
