"""Matching of components, and a canonical order and sign. Both are arbitrary in a factorization.

Shapes: K and L components, D sketch.
"""

from __future__ import annotations

import numpy as np
import scipy  # imports its subpackages on first use, which takes half a second for scipy.optimize
import torch
from torch import Tensor


def match_components(a_KD: np.ndarray, b_LD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match the rows of a and b with the largest sum of |cos| (Hungarian algorithm).

    Returns:
        pairs: (min(K, L), 2) int64, a row of a and the matched row of b, ascending in a.
        cosines: |cos| of each pair, float64; 0 if one of the rows is zero.
    """
    a, b = (_unit_rows(np.asarray(x, dtype=np.float64)) for x in (a_KD, b_LD))
    cosines_KL = np.abs(a @ b.T)
    rows, columns = scipy.optimize.linear_sum_assignment(cosines_KL, maximize=True)
    return np.stack([rows, columns], axis=1), cosines_KL[rows, columns]


def canonical_order(components_KD: Tensor, energy_K: Tensor, n_frozen: int = 0) -> tuple[Tensor, Tensor]:
    """Return a canonical order (K,) and signs (K,), which are equal for equivalent factorizations.

    Components are sorted by descending energy Σ_i W_ij², and the entry of largest magnitude is positive. The first
    `n_frozen` components keep their positions and signs. Apply the result as `components[order] * signs[:, None]` and
    `coefficients[:, order]`.
    """
    free = energy_K[n_frozen:].argsort(descending=True, stable=True) + n_frozen
    order = torch.cat([torch.arange(n_frozen, device=free.device), free])
    signs = canonical_signs(components_KD)
    signs[:n_frozen] = 1.0
    return order, signs[order]


def canonical_signs(components_KD: Tensor) -> Tensor:
    """Return the signs (K,) that make the entry of largest magnitude of each component positive."""
    largest = components_KD.abs().argmax(dim=1, keepdim=True)
    return torch.where(components_KD.gather(1, largest)[:, 0] < 0, -1.0, 1.0).to(components_KD)


def near_duplicates(components_KD: Tensor, threshold: float = 0.95) -> list[tuple[int, int, float]]:
    """Return the pairs (j, l, cos) of unit components, j < l, with |cos| above the threshold."""
    cosines_KK = components_KD @ components_KD.T
    pairs = (cosines_KK.abs().triu(diagonal=1) > threshold).nonzero().tolist()
    return [(j, k, float(cosines_KK[j, k])) for j, k in pairs]


def _unit_rows(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    result: np.ndarray = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    return result
