"""One damped Gauss-Newton step on the components, from statistics whose size does not depend on N.

With coefficients W fixed, a change Δ of the components H changes the residual of example i by
−Σ_j W_ij (δ_j h_jᵀ + h_j δ_jᵀ). Minimising the linearised loss plus 2μ‖Δ‖² over Δ gives the linear system

    (S + μI) Δ + (WW ∘ (H Δᵀ)) H = U − S H,    S = WW ∘ (H Hᵀ),  WW = Wᵀ W,  U_j = Σ_i W_ij Âᵢᵀ Âᵢ h_j.

The second term depends only on the part of Δ in the row space of H, and its value lies in this row space. Outside the
row space, one Cholesky solve with S + μI is exact. Inside it, conjugate gradients solve for at most K·K unknowns,
independent of the sketch dimension.

The first components may be frozen. They have δ_j = 0, and the system is restricted to the free rows and columns. A
penalty c Σ_{j≠l} (h_j·h_l)² on the components has the residuals √c h_j·h_l. With C = c (11ᵀ − I), it replaces S H by
(S + C ∘ HHᵀ) H on the right side and adds (C ∘ (Δ Hᵀ + H Δᵀ)) H on the left side.

Shapes: N examples, K components, F free ones, D sketch, Q = min(K, D) dimensions of the row space.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gauss_newton_step(
    components_KD: Tensor,
    u_KD: Tensor,
    ww_KK: Tensor,
    damping: float,
    *,
    orthogonality: float = 0.0,
    n_frozen: int = 0,
    max_iterations: int = 12,
) -> Tensor:
    """Solve the system above for Δ (K, D), all in float64.

    Conjugate gradients, preconditioned with (S + μI)⁻¹, stop after `max_iterations` or at a relative residual of 1e-8.
    The solution need not be more exact: the system is an approximation, and the solver accepts or rejects the step by
    the loss after it.

    Args:
        components_KD: H, unit rows.
        u_KD: U.
        ww_KK: WW.
        damping: μ > 0, in the units of WW.
        orthogonality: c.
        n_frozen: number of frozen components, which are the first rows.
        max_iterations: maximum number of iterations of conjugate gradients.
    """
    basis_DQ = torch.linalg.qr(components_KD.T).Q
    h_KQ, free = components_KD @ basis_DQ, slice(n_frozen, None)
    cosines_KK = h_KQ @ h_KQ.T
    c_KK = orthogonality * (1 - torch.eye(len(h_KQ), dtype=h_KQ.dtype, device=h_KQ.device))
    s_KK = ww_KK * cosines_KK
    s_FF = s_KK[free, free]
    chol_FF = torch.linalg.cholesky(s_FF + damping * torch.eye(len(s_FF), dtype=s_FF.dtype, device=s_FF.device))
    u_FD = u_KD[free]
    u_FQ = u_FD @ basis_DQ
    outside_FD = torch.cholesky_solve(u_FD - u_FQ @ basis_DQ.T, chol_FF)
    h_FQ, ww_FF, c_FK = h_KQ[free], ww_KK[free, free], c_KK[free]

    def apply(p_FQ: Tensor) -> Tensor:
        product = s_FF @ p_FQ + damping * p_FQ + ((ww_FF + c_FK[:, free]) * (h_FQ @ p_FQ.T)) @ h_FQ
        result: Tensor = product + (c_FK * (p_FQ @ h_KQ.T)) @ h_KQ if orthogonality else product
        return result

    rhs_FQ = u_FQ - ((ww_KK + c_KK) * cosines_KK)[free] @ h_KQ
    inside_FQ = _conjugate_gradients(apply, rhs_FQ, chol_FF, max_iterations)
    step_KD = torch.zeros_like(components_KD)
    step_KD[free] = outside_FD.addmm_(inside_FQ, basis_DQ.T)
    return step_KD


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], rhs_FQ: Tensor, chol_FF: Tensor, max_iterations: int
) -> Tensor:
    x, r = torch.zeros_like(rhs_FQ), rhs_FQ.clone()
    z = torch.cholesky_solve(r, chol_FF)
    p, rz = z, torch.sum(r * z)
    target = 1e-8 * torch.linalg.norm(rhs_FQ)
    for _ in range(max_iterations):
        if not bool(torch.linalg.norm(r) > target):
            break
        ap = apply(p)
        alpha = rz / torch.sum(p * ap)
        x = x + alpha * p
        r = r - alpha * ap
        z = torch.cholesky_solve(r, chol_FF)
        rz, previous = torch.sum(r * z), rz
        p = z + (rz / previous) * p
    return x
