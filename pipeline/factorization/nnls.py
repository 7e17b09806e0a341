"""Non-negative least squares for many examples that share one Gram matrix.

Every example i solves  min over w ≥ 0 of  wᵀ G w − 2 wᵀ t_i,  G (K, K) positive semidefinite, t_i (K,).

`hals_` makes a few cheap descent sweeps over all examples at once and is what an iteration of the solver uses.
`nnls` goes to the optimum: HALS sweeps propose a support, a Cholesky factorization per example gives the exact values
on it, as in the active-set method of Lawson & Hanson (1974, ch. 23) but with whole sweeps choosing what enters.

Shapes: N examples, K components, U unsolved examples, S largest support.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GROUP = 32
"""Components whose coefficients stay in the cache while each of them is updated in turn."""

_SWEEPS_PER_ROUND = 4
_MAX_ROUNDS = 200
_SUPPORT_BLOCK_ELEMENTS = 1 << 22
"""Entries of the stacked support Gram matrices held at once (32 MiB in float64)."""


def hals_(coefficients_KN: Tensor, targets_KN: Tensor, gram_KK: Tensor, sweeps: int) -> Tensor:
    """Exact coordinate descent in place: w_k ← max(0, w_k + (t_k − G_k·w)/G_kk), component after component.

    Components are rows, so that one update streams contiguous memory. A component with G_kk = 0 gets w_k = 0. No
    sweep raises the objective of any example, and one that starts at zero leaves it (unlike multiplicative updates).

    G_k·w is split: what the components of other groups add to it does not change while those of one group take their
    turns, and so is one matrix product for all of them; only the group's own few rows are read again for each.

    Source: Cichocki & Phan, hierarchical alternating least squares (IEICE Trans. 2009).
    """
    diagonal = gram_KK.diagonal().tolist()
    groups = [slice(first, first + _GROUP) for first in range(0, len(gram_KK), _GROUP)]
    between_KK = gram_KK.clone()
    for group in groups:
        between_KK[group, group] = 0.0
    for _ in range(sweeps):
        for group in groups:
            targets, rows, within = targets_KN[group], coefficients_KN[group], gram_KK[group, group]
            if len(groups) > 1:
                targets = torch.addmm(targets, between_KK[group], coefficients_KN, alpha=-1.0)
            for k, g_kk in enumerate(diagonal[group]):
                if g_kk <= 0.0:
                    rows[k].zero_()
                    continue
                descent = torch.addmv(targets[k], rows.T, within[k], alpha=-1.0)
                rows[k].add_(descent, alpha=1.0 / g_kk).clamp_(min=0.0)
    return coefficients_KN


def nnls(targets_NK: Tensor, gram_KK: Tensor, start_NK: Tensor | None = None, tolerance: float = 1e-12) -> Tensor:
    """The optimal non-negative coefficients (N, K) in float64.

    An example is solved when its optimality conditions hold: w ≥ 0, and with g = G w − t, |min(w_k, g_k)| ≤
    tolerance · max(1, ‖t‖_∞) for every k with G_kk > 0. Each round lowers the objective: sweeps of `hals_`, then a step
    towards the unconstrained optimum on the support, cut short where a coefficient would turn negative. Should G be so
    close to singular that an example is not solved within the rounds, its best coefficients are returned.

    Args:
        targets_NK: t_i in its rows.
        gram_KK: G, symmetric positive semidefinite.
        start_NK: where to start from, non-negative; zeros by default. It is not modified.
        tolerance: of the optimality conditions.
    """
    gram = gram_KK.double()
    targets = targets_NK.double().T.contiguous()
    solution = torch.zeros_like(targets) if start_NK is None else start_NK.double().T.contiguous()
    live_K1 = (gram.diagonal() > 0)[:, None]
    unsolved = torch.arange(targets.shape[1], device=targets.device)
    for _ in range(_MAX_ROUNDS):
        if unsolved.numel() == 0:
            break
        t, w = targets[:, unsolved], solution[:, unsolved]
        hals_(w, t, gram, _SWEEPS_PER_ROUND)
        w = _step_on_support(w.T.contiguous(), t.T, gram).T
        solution[:, unsolved] = w
        violation = torch.minimum(w, gram @ w - t).abs() * live_K1
        scale = t.abs().amax(dim=0).clamp(min=1.0)
        unsolved = unsolved[violation.amax(dim=0) > tolerance * scale]
    return solution.T.contiguous()


def _step_on_support(w_UK: Tensor, t_UK: Tensor, gram_KK: Tensor) -> Tensor:
    """Move each row to the optimum over its support {k : w_k > 0}, or as far towards it as w ≥ 0 allows."""
    sizes_U, order_U = (w_UK > 0).sum(dim=1).sort(stable=True)
    sizes = sizes_U.tolist()
    moved_UK = w_UK.clone()
    start = sum(size == 0 for size in sizes)
    while start < len(sizes):
        # Supports are padded to the largest of their block. They ascend, so halving a block also makes it narrower.
        stop = len(sizes)
        while stop - start > 1 and (stop - start) * sizes[stop - 1] ** 2 > _SUPPORT_BLOCK_ELEMENTS:
            stop = (start + stop) // 2
        block = order_U[start:stop]
        moved_UK[block] = _step_on_support_block(w_UK[block], t_UK[block], gram_KK, sizes[stop - 1])
        start = stop
    return moved_UK


def _step_on_support_block(w_UK: Tensor, t_UK: Tensor, gram_KK: Tensor, size: int) -> Tensor:
    inside, support_US = (w_UK > 0).int().sort(dim=1, descending=True, stable=True)
    support_US, inside_US = support_US[:, :size], inside[:, :size].bool()
    gram_USS = gram_KK[support_US[:, :, None], support_US[:, None, :]]
    gram_USS = gram_USS * (inside_US[:, :, None] & inside_US[:, None, :])
    # Padding becomes an identity block; the ridge, far below the tolerance, keeps duplicate components solvable.
    ridge = 1e-14 * gram_KK.diagonal().max()
    gram_USS.diagonal(dim1=1, dim2=2).add_(torch.where(inside_US, ridge, 1.0))
    chol_USS, info_U = torch.linalg.cholesky_ex(gram_USS)
    now_US = torch.gather(w_UK, 1, support_US)
    target_US = torch.gather(t_UK, 1, support_US) * inside_US
    best_US = torch.cholesky_solve(target_US[:, :, None], chol_USS)[:, :, 0]
    best_US = torch.where((info_U == 0)[:, None], best_US, now_US)
    falling = inside_US & (best_US < 0)
    ratio_US = torch.where(falling, now_US / (now_US - best_US), torch.ones_like(now_US))
    step_U1 = ratio_US.amin(dim=1, keepdim=True)
    moved_US = torch.lerp(now_US, best_US, step_U1)
    # The coefficient that limits the step leaves the support exactly, not to within rounding.
    moved_US = torch.where((falling & (ratio_US <= step_U1)) | ~inside_US, 0.0, moved_US.clamp(min=0.0))
    return torch.zeros_like(w_UK).scatter_(1, support_US, moved_US)
