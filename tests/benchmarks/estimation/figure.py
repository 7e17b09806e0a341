"""The picture of docs/estimators.md: trace, diagonal and ranks of each estimator at three moments of training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

COLOURS = {"initialization": "#1f5fa8", "half-trained": "#b4531f", "converged": "#3b7a3b"}
NAMES, PANEL, GAP, TOP, ROW, BOTTOM = 190, 220, 22, 66, 24, 30


Panel = tuple[str, Callable[[dict[str, Any]], float], Callable[[float], float], tuple[float, ...]]
"""The title, the number of an estimator, its place from 0 to 1, and the ticks."""


def _share(value: float) -> float:
    return max(value, 0.0)


def _logarithmic(low: float, high: float) -> Callable[[float], float]:
    """The place of a number on a logarithmic axis, from 0 to 1. Numbers outside are at its ends."""
    return lambda value: (math.log(min(max(value, low), high)) - math.log(low)) / (math.log(high) - math.log(low))


def figure(means: dict[str, Any]) -> str:
    """Return the picture, from the means over the seeds of the network."""
    panels: list[Panel] = [
        ("trace, relative to the Fisher", lambda row: row["trace"]["mean"], _logarithmic(0.01, 4), (0.01, 0.1, 1)),
        ("error of the diagonal", lambda row: row["diagonal"]["error"], lambda v: min(v, 1.2) / 1.2, (0, 0.5, 1)),
        ("rank correlation of the diagonal", lambda row: row["rank_correlation"]["mean"], _share, (0, 0.5, 1)),
    ]
    names = list(next(iter(means.values()))["estimators"])
    width = NAMES + len(panels) * (PANEL + GAP)
    height = TOP + ROW * len(names) + BOTTOM
    marks = []
    for number, name in enumerate(names):
        y = TOP + ROW * number + ROW / 2
        marks.append(f'<text x="{NAMES - 12}" y="{y + 4:.0f}" text-anchor="end">{name}</text>')
        marks.append(f'<path d="M{NAMES} {y:.0f}H{width - GAP}" stroke="#e3e3e3"/>')
    for number, (title, value, place, ticks) in enumerate(panels):
        left = NAMES + number * (PANEL + GAP)
        marks.append(f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{title}</text>')
        for tick in ticks:
            x = left + place(tick) * PANEL
            marks.append(f'<path d="M{x:.1f} {TOP}V{height - BOTTOM}" stroke="#bbb"/>')
            marks.append(f'<text x="{x:.1f}" y="{height - BOTTOM + 18}" text-anchor="middle">{tick:g}</text>')
        for moment, (name, colour) in enumerate(COLOURS.items()):
            for row, estimate in enumerate(means[name]["estimators"].values()):
                x, y = left + place(value(estimate)) * PANEL, TOP + ROW * row + ROW / 2 + 5 * (moment - 1)
                marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    legend = []
    x = NAMES
    for name, colour in COLOURS.items():
        legend.append(f'<circle cx="{x + 4}" cy="36" r="4" fill="{colour}"/><text x="{x + 14}" y="40">{name}</text>')
        x += 120
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
            ' font-family="sans-serif" font-size="12" fill="#1c2126">',
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="{NAMES}" y="20">Estimates of the mean Fisher of a network for digits, against the dense matrix'
            "</text>",
            *legend,
            *marks,
            "</svg>\n",
        ]
    )
