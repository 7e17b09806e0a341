"""The table `selectivity` as an image per sign, and as numbers per component.

A step along the direction of a component changes the predictions on its own top examples by about the target KL. It
should not change the predictions on the top examples of the other components. Every row is relative to the KL of its
own component, so rows are comparable although their steps differ.

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
"""Side of the image, in SVG user units."""


@dataclass(frozen=True)
class SelectivityChart:
    """The matrix of one sign: row = component of the step, column = component of the measured top examples."""

    examples: str
    sign: int
    picture: str
    """The image as a data URI, with row and column 0 at the top left."""
    axis: Axis
    """Maps a component to the center of its row (column), from the edge of the image."""
    median_other: float
    """Median of the relative KL over all pairs of different components."""
    share_below_half: float
    """Fraction of these pairs with a relative KL below one half."""


@dataclass(frozen=True)
class Selectivity:
    """A step along one component: mean KL (nats) on its own top examples and on those of the other components."""

    sign: int
    own: float
    median_other: float
    most_moved: list[tuple[int, float]]


def selectivity_charts(table: pa.Table) -> list[SelectivityChart]:
    """Return a chart for each sign, + first; empty if there are fewer than two components."""
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
    """Return the selectivity of each component for each sign, + first."""
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
    """Return, for each sign, the components and their KLs (K, K), moved × measured; NaN for a missing pair."""
    moved, measured, signs = (table[name].to_numpy() for name in ("moved", "component", "sign"))
    components = np.intersect1d(moved, measured)
    if len(components) < 2:
        return {}
    chosen = np.isin(moved, components) & np.isin(measured, components)
    rows, columns = np.searchsorted(components, moved), np.searchsorted(components, measured)
    found = {}
    for sign in sorted(set(signs.tolist()), reverse=True):
        of_sign = chosen & (signs == sign)
        kl_KK = np.full((len(components), len(components)), np.nan)
        kl_KK[rows[of_sign], columns[of_sign]] = table["kl"].to_numpy()[of_sign]
        found[sign] = (components.tolist(), kl_KK)
    return found
