"""Components are defined only up to order and sign: matching them, and a canonical choice of both.

Shapes: K and L components, D sketch.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def match_components(a_KD: np.ndarray, b_LD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair the rows of a with those of b so that the sum of |cos| is largest (Hungarian algorithm).

    Returns:
        pairs: (min(K, L), 2) int64, a row of a and its row of b, ascending in a.
        cosines: |cos| of each pair, float64; 0 where a row is zero.
    """
    a, b = (_unit_rows(np.asarray(x, dtype=np.float64)) for x in (a_KD, b_LD))
    cosines_KL = np.abs(a @ b.T)
    rows, columns = linear_sum_assignment(cosines_KL, maximize=True)
    return np.stack([rows, columns], axis=1), cosines_KL[rows, columns]


def canonical_order(components_KD: Tensor, energy_K: Tensor, n_frozen: int = 0) -> tuple[Tensor, Tensor]:
    """The order and signs that make equal factorizations look equal: (order (K,), signs (K,)).

    Components come by descending energy Σ_i W_ij²; the entry of largest magnitude is positive. The first
    `n_frozen` keep their places and signs. Apply as
    `components[order] * signs[:, None]` and `coefficients[:, order]`.
    """
    free = energy_K[n_frozen:].argsort(descending=True, stable=True) + n_frozen
    order = torch.cat([torch.arange(n_frozen, device=free.device), free])
    largest = components_KD.abs().argmax(dim=1, keepdim=True)
    signs = torch.where(components_KD.gather(1, largest)[:, 0] < 0, -1.0, 1.0).to(components_KD)
    signs[:n_frozen] = 1.0
    return order, signs[order]


def near_duplicates(components_KD: Tensor, threshold: float = 0.95) -> list[tuple[int, int, float]]:
    """Pairs (j, l, cos) of unit components, j < l, whose |cos| exceeds the threshold."""
    cosines_KK = components_KD @ components_KD.T
    pairs = (cosines_KK.abs().triu(diagonal=1) > threshold).nonzero().tolist()
    return [(j, k, float(cosines_KK[j, k])) for j, k in pairs]


def _unit_rows(x: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    result: np.ndarray = np.divide(x, norms, out=np.zeros_like(x), where=norms > 0)
    return result
