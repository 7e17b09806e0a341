"""Fishers with known components: the ground truth that solvers are judged by.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Planted:
    factors_NRD: np.ndarray
    """Normalised: ‖Â_iᵀ Â_i‖_F = 1. float64."""
    components_KD: np.ndarray
    """Unit rows."""
    coefficients_NK: np.ndarray
    """Of the Fishers before truncation, noise and normalisation."""


def planted_fishers(
    *,
    n_examples: int,
    rank: int,
    dim: int,
    n_components: int,
    noise: float,
    seed: int,
    n_active: int = 4,
    cosine: float = 0.0,
    zipf: float = 0.0,
) -> Planted:
    """F_i = Σ_j W_ij h_j h_jᵀ with `n_active` coefficients from U(0.2, 1), truncated to its `rank` largest eigenpairs.

    Components are random directions that share one more, so that `cosine` is the mean cosine of two of them. Which of
    them are active is drawn without replacement, component j with a frequency in proportion to (j + 1)^−zipf. Noise is
    Gaussian, added to the factor before normalisation, of Frobenius norm `noise` relative to the factor's.
    """
    rng = np.random.default_rng(seed)
    h_KD = rng.standard_normal((n_components, dim))
    h_KD /= np.linalg.norm(h_KD, axis=1, keepdims=True)
    if cosine > 0:
        shared_D = rng.standard_normal(dim)
        h_KD = np.sqrt(1 - cosine) * h_KD + np.sqrt(cosine) * shared_D / np.linalg.norm(shared_D)
        h_KD /= np.linalg.norm(h_KD, axis=1, keepdims=True)
    w_NK = np.zeros((n_examples, n_components))
    # Waiting times of rates f_j: the first `n_active` arrivals are a draw without replacement in proportion to f_j.
    frequencies_K = np.arange(1.0, n_components + 1) ** -zipf
    waits_NK = -np.log1p(-rng.random((n_examples, n_components))) / frequencies_K
    active = waits_NK.argsort(axis=1)[:, :n_active]
    np.put_along_axis(w_NK, active, rng.uniform(0.2, 1.0, active.shape), axis=1)
    # The rows √W_ij h_j of the active components factor F_i; its SVD orders them by eigenvalue.
    rows = np.sqrt(np.take_along_axis(w_NK, active, axis=1))[:, :, None] * h_KD[active]
    _, s, v = np.linalg.svd(rows, full_matrices=False)
    factors_NRD = np.zeros((n_examples, rank, dim))
    kept = min(rank, n_active)
    factors_NRD[:, :kept] = s[:, :kept, None] * v[:, :kept]
    disturbance = rng.standard_normal(factors_NRD.shape)
    scale = np.linalg.norm(factors_NRD, axis=(1, 2)) / np.linalg.norm(disturbance, axis=(1, 2))
    return normalised(factors_NRD + noise * scale[:, None, None] * disturbance, h_KD, w_NK)


HARD_PROBLEMS: dict[str, dict[str, float]] = {
    "well-conditioned": {"n_active": 3},
    "shared direction": {"n_active": 3, "cosine": 0.8, "zipf": 1.2},
    "more active than rank": {"n_active": 6},
    "fewer fitted than true": {"n_active": 3},
}
"""What the four problems of `hard_problem` differ in, as arguments of `planted_fishers`."""


def hard_problem(name: str, seed: int, **changes: float) -> tuple[Planted, int]:
    """A problem of `HARD_PROBLEMS` and the number of components to fit: N = 4000, C = 4 classes (so R = 3), D = 1024,
    K = 64 components of which the last problem fits 48, and 20% noise, unless `changes` says otherwise."""
    sizes = {"n_examples": 4000, "rank": 3, "dim": 1024, "n_components": 64, "noise": 0.2}
    arguments: dict[str, Any] = sizes | HARD_PROBLEMS[name] | changes
    n_true: int = arguments["n_components"]
    return planted_fishers(**arguments, seed=seed), 3 * n_true // 4 if name == "fewer fitted than true" else n_true


def normalised(factors_NRD: np.ndarray, components_KD: np.ndarray, coefficients_NK: np.ndarray) -> Planted:
    norms_N = np.linalg.norm(factors_NRD @ factors_NRD.transpose(0, 2, 1), axis=(1, 2))
    return Planted(factors_NRD / np.sqrt(norms_N)[:, None, None], components_KD, coefficients_NK)
