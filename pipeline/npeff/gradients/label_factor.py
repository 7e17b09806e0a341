"""Factors of the covariance of one draw from a categorical distribution.

Legend: B batch, C classes, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

# log-probabilities are kept above this, so that a gap between logits near the float64 limit gives 0, never inf - inf
_LOG_ZERO = -1e300


def exact_label_factor(logits_BC: Tensor) -> Tensor:
    """L (B, C, R = C-1), float64, with L Lᵀ = S = diag(p) - p pᵀ and p = softmax(logits).

    S is the Fisher matrix of the logits of one example, so F = Jᵀ S J = (LᵀJ)ᵀ(LᵀJ). It has rank C-1, its null vector
    is 1. L is its Cholesky factor in closed form, with the tail sums q_j = Σ_{k≥j} p_k:

        L_jj = √(p_j q_{j+1} / q_j),   L_kj = -p_k √(p_j / (q_j q_{j+1}))  for k > j,   0 above the diagonal.

    Unlike eigenvectors it has no freedom of sign or of basis within a degenerate eigenvalue, so an example's factor
    depends on its logits only. It is evaluated from log-probabilities: a saturated prediction keeps its full relative
    accuracy. (K. Tanabe & M. Sagae, An exact Cholesky decomposition and the generalized inverse of the
    variance-covariance matrix of the multinomial distribution, J. R. Statist. Soc. B 54, 1992.)
    """
    log_p = torch.log_softmax(logits_BC.double(), dim=-1).clamp_min(_LOG_ZERO)
    log_q = log_p.flip(-1).logcumsumexp(-1).flip(-1)
    log_p_j, log_q_j, log_q_next = log_p[:, :-1], log_q[:, :-1], log_q[:, 1:]
    diagonal = torch.exp(0.5 * (log_p_j + log_q_next - log_q_j))
    below = -torch.exp(log_p[:, :, None] + 0.5 * (log_p_j - log_q_j - log_q_next)[:, None, :])
    return below.tril(-1).diagonal_scatter(diagonal, dim1=-2, dim2=-1)


def truncated_label_factor(logits_BC: Tensor, rank: int, kept_trace: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The largest eigenpairs of S: L (B, C, rank) = U √Λ, how many of its columns are used (B,), and their share (B,)
    of the trace of S.

    Used are the fewest that keep a share of at least `kept_trace`, at most `rank`; other columns are zero. The sign of
    a column makes its sum with weights from 1 to 2 positive. float64.
    """
    factor_BCR = exact_label_factor(logits_BC)
    # the eigenpairs of S by the singular vectors of its factor, which keep the relative accuracy of a saturated
    # prediction; S itself would have rounding errors of the size of its largest entries
    vectors_BCR, values_BR, _ = torch.linalg.svd(factor_BCR, full_matrices=False)
    energy_BR = values_BR.square()
    total_B1 = energy_BR.sum(1, keepdim=True)
    share_BR = (energy_BR.cumsum(1) / total_B1.where(total_B1 > 0, 1))[:, :rank]
    # rounding of the shares must not add a pair for the last digit of a sum that is 1
    ranks_B = 1 + (share_BR[:, :-1] < kept_trace - 1e-12).sum(1)
    used_BR = torch.arange(share_BR.shape[1], device=ranks_B.device) < ranks_B[:, None]
    kept_B = share_BR.gather(1, ranks_B[:, None] - 1)[:, 0].where(total_B1[:, 0] > 0, 1)
    columns_BCR = (vectors_BCR * values_BR[:, None])[:, :, :rank]
    # its largest entry would be a tie in the vector of two classes, (1, -1)
    generic_C1 = torch.linspace(1, 2, columns_BCR.shape[1], dtype=torch.float64, device=columns_BCR.device)[:, None]
    sums_B1R = (columns_BCR * generic_C1).sum(1, keepdim=True)
    return torch.where(sums_B1R < 0, -columns_BCR, columns_BCR) * used_BR[:, None], ranks_B, kept_B
