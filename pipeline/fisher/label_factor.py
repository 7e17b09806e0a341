"""Factor of the covariance of one draw from a categorical distribution.

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
