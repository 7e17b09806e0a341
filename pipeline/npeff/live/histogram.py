"""The histogram of the coefficients of a component."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npeff.reports.charts import Axis

WIDTH, HEIGHT = 460.0, 190.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 10.0, 10.0, 34.0
_BINS = 30


@dataclass(frozen=True)
class Bar:
    """A bar, in SVG user units, with the examples that it counts."""

    x: float
    y: float
    width: float
    height: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Histogram:
    """Numbers of examples by their coefficient, on a logarithmic axis."""

    width: float
    height: float
    x_axis: Axis
    y_axis: Axis
    bars: list[Bar]
    n_active: int
    n_examples: int


def histogram(coefficients_n: NDArray[np.float64], n_examples: int) -> Histogram | None:
    """Return the histogram of the positive coefficients; None if there are none.

    Args:
        coefficients_n: The positive coefficients.
        n_examples: Number of all examples.
    """
    if not len(coefficients_n):
        return None
    counts, edges = np.histogram(coefficients_n, bins=_BINS, range=(0.0, float(coefficients_n.max())))
    x_axis = Axis(0.0, float(edges[-1]), _LEFT, WIDTH - _RIGHT)
    most = 10.0 ** max(1, math.ceil(math.log10(counts.max() + 1)))
    y_axis = Axis(0.5, most, HEIGHT - _BOTTOM, _TOP, log=True)
    bars = []
    for n, low, high in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if n:
            left, right, top = x_axis.position(low), x_axis.position(high), y_axis.position(n)
            bars.append(Bar(left, top, round(right - left - 1, 2), round(y_axis.start - top, 2), n, low, high))
    return Histogram(WIDTH, HEIGHT, x_axis, y_axis, bars, len(coefficients_n), n_examples)
