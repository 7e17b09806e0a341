"""The rows of a sketched Fisher factor recombined so that their Gram matrix is the exact one.

A sketch keeps inner products on average; the error in the length of a row is one that the exact Gram matrix takes away.
It is most of the error in the inner products of similar examples, which are the large ones: with it taken away, the
Fishers' inner products are about twice as accurate at the same dimension.

Legend: B batch, R rank, D sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_RANK = 64
"""Beyond it the R³ work would cost more than the sketch itself, and the rows are left as they are."""


def calibrated(factors_BRD: Tensor, grams_BRR: Tensor) -> Tensor:
    """C A Qᵀ (B, R, D) with a C (R × R) near the identity for which its Gram matrix is G = A Aᵀ.

    With S = A Qᵀ (A Qᵀ)ᵀ it is C = S^½ M^½ S^-½, M = S^-½ G S^-½: the rows in an orthonormal basis, their lengths and
    angles mended there. A small multiple of the identity, some rounding errors of the model's precision, is added to G
    and S: rows that are zero, equal or nearly dependent stay so, and the Gram matrix is exact but for that. Matrices
    that are not finite give rows that are not.
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
    mended_BRR, _ = _root(inverse_BRR @ exact_BRR @ inverse_BRR)
    recombination_BRR = (root_BRR @ mended_BRR @ inverse_BRR).where(finite_B11, torch.nan)
    return recombination_BRR.to(factors_BRD) @ factors_BRD


def _root(matrices_BRR: Tensor) -> tuple[Tensor, Tensor]:
    """Square roots of positive matrices, and the roots' inverses."""
    values_BR, vectors_BRR = torch.linalg.eigh(matrices_BRR)
    root_BR = values_BR.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    return (vectors_BRR * root_BR[:, None]) @ vectors_BRR.mT, (vectors_BRR / root_BR[:, None]) @ vectors_BRR.mT
