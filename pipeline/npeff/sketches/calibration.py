"""Calibration: recombine the rows of a sketched Fisher factor so that their Gram matrix is exact.

A sketch preserves inner products on average. The exact Gram matrix corrects the errors in the lengths and angles of an
example's rows. These errors dominate in the inner products of similar examples, which are the largest inner products.
With the correction, the inner products of Fishers are about twice as accurate at the same dimension.

Legend: B batch, R rank, D sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_RANK = 64
"""Rows of factors with a larger rank are not calibrated, because the R³ work would cost more than the sketch."""


def calibrated(factors_BRD: Tensor, grams_BRR: Tensor) -> Tensor:
    """Compute C A Qᵀ (B, R, D), where C (R × R) is near the identity and the Gram matrix of the result is G = A Aᵀ.

    With S = A Qᵀ (A Qᵀ)ᵀ, C = S^½ M^½ S^-½ and M = S^-½ G S^-½: the lengths and angles of the rows are corrected in an
    orthonormal basis. The function adds a small multiple of the identity, a few rounding errors of the model's
    precision, to G and S. Rows that are zero, equal or nearly dependent therefore remain so, and the Gram matrix is
    exact up to this term.

    Args:
        factors_BRD: Sketched factors A Qᵀ.
        grams_BRR: Exact Gram matrices A Aᵀ, float64.

    Returns:
        The calibrated factors. Rows are not finite where an input matrix is not finite.
    """
    if factors_BRD.shape[1] > LARGEST_RANK:
        return factors_BRD
    rows_BRD = factors_BRD.double()
    sketched_BRR = rows_BRD @ rows_BRD.mT
    finite_B11 = (sketched_BRR.isfinite() & grams_BRR.isfinite()).all(dim=(1, 2), keepdim=True)
    identity_RR = torch.eye(factors_BRD.shape[1], dtype=torch.float64, device=factors_BRD.device)
    trace_B11 = sketched_BRR.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    usable_B11 = finite_B11 & (trace_B11 > 0)
    rounding = 1e-7 if factors_BRD.dtype == torch.float64 else 1e-5
    sketched_BRR = (sketched_BRR / trace_B11).where(usable_B11, 0) + rounding * identity_RR
    exact_BRR = (grams_BRR / trace_B11).where(usable_B11, 0) + rounding * identity_RR
    root_BRR, inverse_BRR = _root(sketched_BRR)
    corrected_BRR, _ = _root(inverse_BRR @ exact_BRR @ inverse_BRR)
    recombination_BRR = (root_BRR @ corrected_BRR @ inverse_BRR).where(finite_B11, torch.nan)
    return recombination_BRR.to(factors_BRD) @ factors_BRD


def _root(matrices_BRR: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the square roots of positive matrices, and the inverses of the roots."""
    values_BR, vectors_BRR = torch.linalg.eigh(matrices_BRR)
    root_BR = values_BR.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return (vectors_BRR * root_BR[:, None]) @ vectors_BRR.mT, (vectors_BRR / root_BR[:, None]) @ vectors_BRR.mT
