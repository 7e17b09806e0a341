"""The perceptual scale of a parameter from its Fisher information.

An observer whose internal variable has constant Fisher information has the scale ψ(s) ∝ ∫ √I(t) dt from the first level
to s (Vacher & Mamassian 2024, section 2). Equal steps of ψ are equally distinguishable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_NODES = 20
"""Number of Gauss-Legendre nodes between two levels."""


@dataclass(frozen=True)
class Scale:
    """A perceptual scale at given levels."""

    levels_n: NDArray[np.float64]
    """The levels of the parameter, increasing."""
    psi_n: NDArray[np.float64]
    """The scale at the levels: 0 at the first and 1 at the last. NaN if the length is 0."""
    length: float
    """The Fisher-Rao length ∫ √I ds from the first to the last level."""


@dataclass(frozen=True)
class MeanScale:
    """The mean of several scales at equidistant levels, with a bootstrap interval over the scales."""

    psi_n: NDArray[np.float64]
    low_n: NDArray[np.float64]
    high_n: NDArray[np.float64]


def mean_scale(
    scales: Sequence[tuple[Sequence[float], Sequence[float]]],
    n_levels: int,
    confidence_level: float = 0.99,
    *,
    n_draws: int = 1000,
    seed: int = 0,
) -> MeanScale:
    """Compute the mean of scales at n equidistant levels.

    Args:
        scales: Positions from 0 to 1, and values there, of each scale.
        n_levels: Number of levels n.
        confidence_level: Probability of the intervals.
        n_draws: Number of draws of scales with replacement.
        seed: Seed of the draws.
    """
    levels_n = np.linspace(0.0, 1.0, n_levels)
    psi_Pn = np.array([np.interp(levels_n, positions, values) for positions, values in scales])
    drawn = np.random.default_rng(seed).integers(len(psi_Pn), size=(n_draws, len(psi_Pn)))
    tails = [(1 - confidence_level) / 2, (1 + confidence_level) / 2]
    low_n, high_n = np.quantile([psi_Pn[chosen].mean(0) for chosen in drawn], tails, axis=0)
    return MeanScale(psi_Pn.mean(0), low_n, high_n)


def perceptual_scale(
    information: Callable[[NDArray[np.float64]], ArrayLike], levels: ArrayLike, *, n_nodes: int = _NODES
) -> Scale:
    """Integrate √I between the levels by Gauss-Legendre quadrature.

    Args:
        information: Fisher information I(s) ≥ 0 of the parameter, for an array of values.
        levels: At least two increasing values of the parameter.
        n_nodes: Number of quadrature nodes between two adjacent levels.

    Returns:
        The scale at the levels, and its length.

    Raises:
        ValueError: The levels do not increase, or the information is negative or not finite somewhere.
    """
    levels_n = np.asarray(levels, np.float64)
    if levels_n.ndim != 1 or len(levels_n) < 2 or not (np.isfinite(levels_n).all() and (np.diff(levels_n) > 0).all()):
        raise ValueError("levels must be at least two finite and increasing values")
    nodes_q, weights_q = np.polynomial.legendre.leggauss(n_nodes)
    half_m = np.diff(levels_n) / 2
    points_mq = (levels_n[:-1] + half_m)[:, None] + half_m[:, None] * nodes_q
    found_mq = np.broadcast_to(np.asarray(information(points_mq), np.float64), points_mq.shape)
    if not np.isfinite(found_mq).all() or (found_mq < 0).any():
        at = points_mq[~(np.isfinite(found_mq) & (found_mq >= 0))][0]
        raise ValueError(f"the Fisher information is negative or not finite at {at:.6g}")
    lengths_n = np.concatenate([[0.0], np.cumsum(half_m * (np.sqrt(found_mq) @ weights_q))])
    length = float(lengths_n[-1])
    psi_n = lengths_n / length if length > 0 else np.full(len(levels_n), np.nan)
    return Scale(levels_n, psi_n, length)
