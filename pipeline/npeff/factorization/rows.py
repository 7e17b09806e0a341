"""Rows of one example each that the kinds ``gradients`` and ``squared`` factorize: X ≈ W B with W, B ≥ 0.

Non-negative matrix factorization needs non-negative rows. A gradient g has both signs and becomes [max(g, 0),
max(−g, 0)] (`folded`). A component of these rows becomes the difference of its two halves (`unfolded`). The squared
entries of a factor, s = Σ_r Â_r ∘ Â_r, are non-negative as they are. A component of squared entries has no signs and
can describe Fishers of any rank.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

import torch
from torch import Tensor


def folded(rows_ND: Tensor) -> Tensor:
    """Return the positive and the negative parts (N, 2 D) of rows, side by side."""
    return torch.cat([rows_ND.clamp(min=0), (-rows_ND).clamp(min=0)], dim=1)


def unfolded(components_KE: Tensor) -> tuple[Tensor, Tensor]:
    """Return unit components (K, D) of the rows before `folded`, and the lengths (K,) by which they were divided.

    A component is zero where its two halves are equal.

    Args:
        components_KE: Non-negative components (K, 2 D) of folded rows.
    """
    positive_KD, negative_KD = components_KE.chunk(2, dim=1)
    components_KD = positive_KD - negative_KD
    lengths_K = components_KD.norm(dim=1)
    return torch.nn.functional.normalize(components_KD, dim=1, eps=1e-300), lengths_K


def squared_entries(factors_NRD: Tensor) -> Tensor:
    """Return Σ_r Â_ir ∘ Â_ir (N, D), the diagonals of the sketched Fishers."""
    return factors_NRD.square().sum(dim=1)
