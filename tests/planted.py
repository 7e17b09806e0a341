"""Fishers with known components: the ground truth that solvers are judged by.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

from dataclasses import dataclass

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
) -> Planted:
    """F_i = Σ_j W_ij h_j h_jᵀ with `n_active` coefficients from U(0.2, 1), truncated to its `rank` largest eigenpairs.

    Noise is Gaussian, added to the factor before normalisation, of Frobenius norm `noise` relative to the factor's.
    """
    rng = np.random.default_rng(seed)
    h_KD = rng.standard_normal((n_components, dim))
    h_KD /= np.linalg.norm(h_KD, axis=1, keepdims=True)
    w_NK = np.zeros((n_examples, n_components))
    active = rng.random((n_examples, n_components)).argsort(axis=1)[:, :n_active]
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


def normalised(factors_NRD: np.ndarray, components_KD: np.ndarray, coefficients_NK: np.ndarray) -> Planted:
    norms_N = np.linalg.norm(factors_NRD @ factors_NRD.transpose(0, 2, 1), axis=(1, 2))
    return Planted(factors_NRD / np.sqrt(norms_N)[:, None, None], components_KD, coefficients_NK)
