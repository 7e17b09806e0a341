"""One damped Gauss-Newton step on the components, from statistics that do not grow with the number of examples.

With coefficients W fixed, a change Δ of the components H changes the residual of example i by
−Σ_j W_ij (δ_j h_jᵀ + h_j δ_jᵀ). Minimising the linearised loss plus 2μ‖Δ‖² over Δ gives the linear system

    (S + μI) Δ + (WW ∘ (H Δᵀ)) H = U − S H,    S = WW ∘ (H Hᵀ),  WW = Wᵀ W,  U_j = Σ_i W_ij Âᵢᵀ Âᵢ h_j.

The second term sees Δ only inside the row space of H, and maps into it. Outside, one Cholesky solve with S + μI is
exact; inside, at most K·K unknowns are left for conjugate gradients, whatever the sketch dimension is.

Shapes: K components, D sketch, Q = min(K, D) dimensions of the row space.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gauss_newton_step(
    components_KD: Tensor, u_KD: Tensor, ww_KK: Tensor, damping: float, *, max_iterations: int = 20
) -> Tensor:
    """Solve the system above for Δ (K, D), all in float64.

    Conjugate gradients preconditioned with (S + μI)⁻¹ stop after `max_iterations` or at a relative residual of 1e-8:
    the system itself is an approximation, and the solver judges the step by the loss it reaches.

    Args:
        components_KD: H, unit rows.
        u_KD: U.
        ww_KK: WW.
        damping: μ > 0, in the units of WW.
        max_iterations: of conjugate gradients.
    """
    basis_DQ = torch.linalg.qr(components_KD.T).Q
    h_KQ = components_KD @ basis_DQ
    s_KK = ww_KK * (h_KQ @ h_KQ.T)
    chol_KK = torch.linalg.cholesky(s_KK + damping * torch.eye(len(s_KK), dtype=s_KK.dtype, device=s_KK.device))
    u_KQ = u_KD @ basis_DQ
    outside_KD = torch.cholesky_solve(u_KD - u_KQ @ basis_DQ.T, chol_KK)
    inside_KQ = _solve_in_row_space(h_KQ, u_KQ - s_KK @ h_KQ, s_KK, ww_KK, damping, chol_KK, max_iterations)
    return outside_KD.addmm_(inside_KQ, basis_DQ.T)


def _solve_in_row_space(
    h_KQ: Tensor, rhs_KQ: Tensor, s_KK: Tensor, ww_KK: Tensor, damping: float, chol_KK: Tensor, max_iterations: int
) -> Tensor:
    x, r = torch.zeros_like(rhs_KQ), rhs_KQ.clone()
    z = torch.cholesky_solve(r, chol_KK)
    p, rz = z, torch.sum(r * z)
    target = 1e-8 * torch.linalg.norm(rhs_KQ)
    for _ in range(max_iterations):
        if not bool(torch.linalg.norm(r) > target):
            break
        ap = s_KK @ p + damping * p + (ww_KK * (h_KQ @ p.T)) @ h_KQ
        alpha = rz / torch.sum(p * ap)
        x = x + alpha * p
        r = r - alpha * ap
        z = torch.cholesky_solve(r, chol_KK)
        rz, previous = torch.sum(r * z), rz
        p = z + (rz / previous) * p
    return x
