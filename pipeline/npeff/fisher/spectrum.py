"""Statistics of the spectrum of a mean Fisher F̄: how many directions of the parameters the predictions depend on.

Legend: D eigenvalues, N examples, P parameters.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

PRIOR_PRECISIONS = (1, 100)
"""Prior precisions α of the effective parameters."""
SHARES = (90, 99)
"""Percentages of the trace whose directions are counted."""

_ROUNDING = 1e-12
"""A share of the trace counts as reached up to this fraction of it."""


def nonnegative(eigenvalues_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the eigenvalues of a positive semidefinite matrix in descending order, without negative rounding errors.

    Raises:
        ValueError: An eigenvalue is not finite.
    """
    if not np.isfinite(eigenvalues_D).all():
        raise ValueError("the eigenvalues must be finite")
    return np.sort(np.maximum(eigenvalues_D, 0.0))[::-1]


def cumulative_shares(eigenvalues_D: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of the trace in the first 1, 2, ... eigenvalues, which descend. NaN if all of them are zero."""
    sums_D = np.cumsum(eigenvalues_D)
    return sums_D / sums_D[-1] if len(sums_D) and sums_D[-1] > 0 else np.full(len(sums_D), np.nan)


def effective_rank(eigenvalues_D: NDArray[np.float64]) -> float:
    """Return exp H(λ/Σλ) for the entropy H (Roy & Vetterli, EUSIPCO 2007)."""
    shares_D = eigenvalues_D[eigenvalues_D > 0] / eigenvalues_D.sum()
    return float(np.exp(-(shares_D * np.log(shares_D)).sum()))


def participation_ratio(eigenvalues_D: NDArray[np.float64]) -> float:
    """Return (Σλ)²/Σλ²."""
    shares_D = eigenvalues_D / eigenvalues_D.sum()
    return float(1.0 / np.square(shares_D).sum())


def effective_parameters(eigenvalues_D: NDArray[np.float64], n_examples: int, prior_precision: float) -> float:
    """Return Σ Nλ/(Nλ + α), the number of parameters that N examples determine better than a prior of precision α.

    Source: MacKay, Neural Computation 4 (1992).
    """
    scaled_D = n_examples * eigenvalues_D
    return float((scaled_D / (scaled_D + prior_precision)).sum())


def resolution(n_examples: int) -> float:
    """Return κ = N/(2π log N) of the local effective dimension.

    Raises:
        ValueError: κ is at most 1, because there are fewer than 19 examples.
    """
    kappa = n_examples / (2 * math.pi * math.log(n_examples)) if n_examples > 1 else 0.0
    if kappa <= 1:
        raise ValueError(f"the local effective dimension needs at least 19 examples, not {n_examples}")
    return kappa


def local_effective_dimension(eigenvalues_D: NDArray[np.float64], n_examples: int, n_parameters: int) -> float:
    """Return Σ log(1 + κPλ/Σλ) / log κ at the parameters of the model.

    Source: Abbas et al., arXiv 2112.04807. Their global dimension averages over many parameters.

    Raises:
        ValueError: As in `resolution`.
    """
    kappa = resolution(n_examples)
    shares_D = eigenvalues_D / eigenvalues_D.sum()
    return float(np.log1p(kappa * n_parameters * shares_D).sum() / math.log(kappa))


def directions_for(eigenvalues_D: NDArray[np.float64], share: float) -> int:
    """Return the smallest number of eigenvalues, which descend, that hold a share of the trace."""
    return int(np.searchsorted(cumulative_shares(eigenvalues_D), share * (1 - _ROUNDING))) + 1


def spectrum_statistics(
    eigenvalues_D: NDArray[np.float64], n_examples: int, n_parameters: int
) -> dict[str, float | None]:
    """Return all statistics of a spectrum, by name.

    Args:
        eigenvalues_D: The eigenvalues of the mean Fisher, descending and not negative. Zeros may be left out.
        n_examples: Number of examples N of the mean.
        n_parameters: Number of parameters P.

    Returns:
        The statistics. None if a statistic is not defined: for a Fisher of zero, and the local effective dimension of
        fewer than 19 examples.
    """
    trace = float(eigenvalues_D.sum())
    found: dict[str, float | None] = {
        "trace": trace,
        "largest": float(eigenvalues_D[0]) if len(eigenvalues_D) else 0.0,
        "effective_rank": effective_rank(eigenvalues_D) if trace > 0 else None,
        "participation_ratio": participation_ratio(eigenvalues_D) if trace > 0 else None,
    }
    for alpha in PRIOR_PRECISIONS:
        found[f"effective_parameters_{alpha}"] = effective_parameters(eigenvalues_D, n_examples, alpha)
    try:
        dimension = local_effective_dimension(eigenvalues_D, n_examples, n_parameters) if trace > 0 else None
    except ValueError:
        dimension = None
    found["local_effective_dimension"] = dimension
    for percentage in SHARES:
        found[f"directions_{percentage}"] = directions_for(eigenvalues_D, percentage / 100) if trace > 0 else None
    found["mean_eigenvalue"] = trace / n_parameters
    found["mean_squared_eigenvalue"] = float(np.square(eigenvalues_D).sum()) / n_parameters
    return found
