"""The table `selectivity` as a picture per sign, and in numbers per component.

Moved along its own direction, a component's top examples change by about the target KL; the top examples of the others
should not. Every row is relative to its own component's KL, so rows compare although their steps differ.

Shapes: K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.reports.charts import Axis
from npeff.reports.pictures import heat_map

_MOST_SHOWN = 3
SIDE = 420.0
"""Of the picture, in SVG user units."""


@dataclass(frozen=True)
class SelectivityChart:
    """One sign: a row for every component moved along, a column for every component whose top examples were watched."""

    examples: str
    sign: int
    picture: str
    """A data URI; row and column 0 are at the top left."""
    axis: Axis
    """Component to where the middle of its row (column) is, from the picture's edge."""
    median_other: float
    """Median over all pairs of different components of their KL relative to the row's own."""
    share_below_half: float
    """Of the same pairs, those below one half."""


@dataclass(frozen=True)
class Selectivity:
    """One component moved: mean KL (nats) on its own top examples and on those of the others."""

    sign: int
    own: float
    median_other: float
    most_moved: list[tuple[int, float]]


def selectivity_charts(table: pa.Table) -> list[SelectivityChart]:
    """A chart for each sign, + first; empty where fewer than two components were moved."""
    charts = []
    for sign, (components, kl_KK) in _matrices(table).items():
        relative_KK = kl_KK / np.maximum(np.diag(kl_KK), 1e-30)[:, None]
        others = relative_KK[~np.eye(len(components), dtype=bool)]
        others = others[np.isfinite(others)]
        if not len(others):
            continue
        half = 0.5 * SIDE / len(components)
        charts.append(
            SelectivityChart(
                examples=table["examples"][0].as_py(),
                sign=sign,
                picture=heat_map(np.nan_to_num(np.minimum(relative_KK, 1.0))),
                axis=Axis(components[0], components[-1], half, SIDE - half),
                median_other=float(np.median(others)),
                share_below_half=float(np.mean(others < 0.5)),
            )
        )
    return charts


def selectivity_by_component(table: pa.Table) -> dict[int, list[Selectivity]]:
    """The same in numbers, + first."""
    found: dict[int, list[Selectivity]] = {}
    for sign, (components, kl_KK) in _matrices(table).items():
        for row, component in enumerate(components):
            others_K = kl_KK[row].copy()
            others_K[row] = np.nan
            if not np.isfinite(kl_KK[row, row]) or not np.isfinite(others_K).any():
                continue
            order = [j for j in np.argsort(-others_K, kind="stable").tolist() if np.isfinite(others_K[j])]
            most = [(components[j], float(others_K[j])) for j in order[:_MOST_SHOWN]]
            median = float(np.nanmedian(others_K))
            found.setdefault(component, []).append(Selectivity(sign, float(kl_KK[row, row]), median, most))
    return found


def _matrices(table: pa.Table) -> dict[int, tuple[list[int], NDArray[np.float64]]]:
    """Sign to the components and their KLs (K, K), moved × watched; NaN where a pair is not in the table."""
    moved, watched, signs = (table[name].to_numpy() for name in ("moved", "component", "sign"))
    components = np.intersect1d(moved, watched)
    if len(components) < 2:
        return {}
    chosen = np.isin(moved, components) & np.isin(watched, components)
    rows, columns = np.searchsorted(components, moved), np.searchsorted(components, watched)
    found = {}
    for sign in sorted(set(signs.tolist()), reverse=True):
        of_sign = chosen & (signs == sign)
        kl_KK = np.full((len(components), len(components)), np.nan)
        kl_KK[rows[of_sign], columns[of_sign]] = table["kl"].to_numpy()[of_sign]
        found[sign] = (components.tolist(), kl_KK)
    return found
