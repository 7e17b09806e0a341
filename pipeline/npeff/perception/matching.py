"""Comparison of a measured perceptual scale with a predicted one."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

_LINEAR = 1e-9
"""Mean distance from the straight line below which a scale counts as linear."""


def area_matching_score(positions: ArrayLike, measured: ArrayLike, predicted: ArrayLike) -> float | None:
    """Compute the area matching score, Σ sign(f − x) (f_th − x) / Σ |f − x| (Vacher & Mamassian 2024).

    The score is 1 if the predicted scale has the measured area between itself and the straight line, 0 if it has none,
    and negative if it lies on the other side.

    Args:
        positions: Positions x of the levels, from 0 to 1, (n,). The straight line is ψ = x.
        measured: The measured scale f at the levels, (n,).
        predicted: The predicted scale f_th at the levels, (n,).

    Returns:
        The score; None if the measured scale is the straight line, for which it is not defined.

    Raises:
        ValueError: The arrays have different shapes, or values that are not finite.
    """
    x_n, f_n, predicted_n = (np.asarray(values, np.float64) for values in (positions, measured, predicted))
    if not x_n.shape == f_n.shape == predicted_n.shape or x_n.ndim != 1:
        raise ValueError("positions, measured and predicted must be vectors of one length")
    if not np.isfinite([x_n, f_n, predicted_n]).all():
        raise ValueError("positions, measured and predicted must be finite")
    area = np.abs(f_n - x_n).sum()
    if area <= _LINEAR * len(x_n):
        return None
    return float((np.sign(f_n - x_n) * (predicted_n - x_n)).sum() / area)
