"""Factors of the covariance of one draw from a categorical distribution.

Legend: B batch, C classes, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

# lower bound of log-probabilities: a gap between logits near the float64 limit then gives 0 and not inf - inf
_LOG_ZERO = -1e300


def exact_label_factor(logits_BC: Tensor) -> Tensor:
    """Compute L (B, C, R = C-1), float64, with L Lᵀ = S = diag(p) - p pᵀ and p = softmax(logits).

    S is the Fisher matrix of the logits of one example, so F = Jᵀ S J = (LᵀJ)ᵀ(LᵀJ). S has rank C-1 and the null vector
    1. L is the Cholesky factor of S in closed form, with the tail sums q_j = Σ_{k≥j} p_k:

        L_jj = √(p_j q_{j+1} / q_j),   L_kj = -p_k √(p_j / (q_j q_{j+1}))  for k > j,   0 above the diagonal.

    The Cholesky factor is unique. Eigenvectors are not: their signs, and their basis within a degenerate eigenvalue,
    are free. An example's factor therefore depends only on its logits. The computation uses log-probabilities, which
    keeps full relative accuracy for saturated predictions. (K. Tanabe & M. Sagae, An exact Cholesky decomposition and
    the generalized inverse of the variance-covariance matrix of the multinomial distribution, J. R. Statist. Soc. B 54,
    1992.)
    """
    log_p = torch.log_softmax(logits_BC.double(), dim=-1).clamp_min(_LOG_ZERO)
    log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
    log_p_j, log_q_j, log_q_next = log_p[:, :-1], log_q[:, :-1], log_q[:, 1:]
    diagonal = torch.exp(0.5 * (log_p_j + log_q_next - log_q_j))
    below = -torch.exp(log_p[:, :, None] + 0.5 * (log_p_j - log_q_j - log_q_next)[:, None, :])
    return below.tril(-1).diagonal_scatter(diagonal, dim1=-2, dim2=-1)


def truncated_label_factor(logits_BC: Tensor, rank: int, kept_trace: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a factor of S from its largest eigenpairs.

    The factor has the smallest number of columns that cover at least the fraction `kept_trace` of the trace, and at
    most `rank` columns. The other columns are zero. The sign of a column is the one for which the sum of its entries,
    weighted from 1 to 2, is positive.

    Args:
        logits_BC: Logits (B, C).
        rank: Maximum number of columns.
        kept_trace: Fraction of the trace of S to cover.

    Returns:
        L = U √Λ (B, C, rank), the number of columns in use (B,), and the fraction (B,) of the trace of S that these
        columns cover. L and the fraction are float64.
    """
    factor_BCR = exact_label_factor(logits_BC)
    # the singular vectors of the factor keep the relative accuracy of a saturated prediction; an eigendecomposition of
    # S would have rounding errors of the size of the largest entries of S
    vectors_BCR, values_BR, _ = torch.linalg.svd(factor_BCR, full_matrices=False)
    energy_BR = values_BR.square()
    total_B1 = energy_BR.sum(1, keepdim=True)
    fraction_BR = (energy_BR.cumsum(1) / total_B1.where(total_B1 > 0, 1))[:, :rank]
    # where the fractions sum to 1, a rounding error in the last digit must not add an eigenpair
    ranks_B = 1 + (fraction_BR[:, :-1] < kept_trace - 1e-12).sum(1)
    used_BR = torch.arange(fraction_BR.shape[1], device=ranks_B.device) < ranks_B[:, None]
    kept_B = fraction_BR.gather(1, ranks_B[:, None] - 1)[:, 0].where(total_B1[:, 0] > 0, 1)
    columns_BCR = (vectors_BCR * values_BR[:, None])[:, :, :rank]
    # the sign of the largest entry would be ambiguous for two classes, where the vector is (1, -1)
    generic_C1 = torch.linspace(1, 2, columns_BCR.shape[1], dtype=torch.float64, device=columns_BCR.device)[:, None]
    sums_B1R = (columns_BCR * generic_C1).sum(1, keepdim=True)
    return torch.where(sums_B1R < 0, -columns_BCR, columns_BCR) * used_BR[:, None], ranks_B, kept_B
