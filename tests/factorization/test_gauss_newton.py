from __future__ import annotations

import pytest
import torch
from npeff.factorization import gauss_newton_step
from torch import Tensor


def problem(k: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors (N, R, D), components, coefficients, U: everything a step is derived from."""
    g = torch.Generator().manual_seed(seed)
    factors_NRD = torch.randn(20, 3, dim, dtype=torch.float64, generator=g)
    h_KD = torch.nn.functional.normalize(torch.randn(k, dim, dtype=torch.float64, generator=g), dim=1)
    w_NK = torch.rand(20, k, dtype=torch.float64, generator=g)
    b_NRK = factors_NRD @ h_KD.T
    return factors_NRD, h_KD, w_NK, torch.einsum("nk,nrk,nrd->kd", w_NK, b_NRK, factors_NRD)


def residuals(h_KD: Tensor, factors_NRD: Tensor, w_NK: Tensor) -> Tensor:
    return factors_NRD.mT @ factors_NRD - torch.einsum("nk,kd,ke->nde", w_NK, h_KD, h_KD)


@pytest.mark.parametrize(("k", "dim"), [(4, 9), (6, 6), (7, 3), (1, 5)])
@pytest.mark.parametrize("damping", [1e-2, 10.0])
def test_the_step_solves_the_dense_damped_normal_equations(k: int, dim: int, damping: float) -> None:
    factors_NRD, h_KD, w_NK, u_KD = problem(k, dim, seed=k)
    jacobian = torch.autograd.functional.jacobian(lambda h: residuals(h, factors_NRD, w_NK).flatten(), h_KD)
    jacobian = jacobian.flatten(1)
    # f + 2μ‖Δ‖² with f = ‖r + JΔ‖²: (JᵀJ + 2μI) Δ = −Jᵀr.
    normal = jacobian.T @ jacobian + 2 * damping * torch.eye(k * dim, dtype=torch.float64)
    expected = torch.linalg.solve(normal, -jacobian.T @ residuals(h_KD, factors_NRD, w_NK).flatten())
    step_KD = gauss_newton_step(h_KD, u_KD, w_NK.T @ w_NK, damping, max_iterations=500)
    torch.testing.assert_close(step_KD, expected.view(k, dim), rtol=1e-6, atol=1e-7 * float(expected.abs().max()))


def test_twenty_iterations_come_close_to_the_exact_step() -> None:
    _, h_KD, w_NK, u_KD = problem(k=12, dim=40, seed=0)
    ww_KK = w_NK.T @ w_NK
    damping = 1e-2 * float(ww_KK.diagonal().mean())
    exact = gauss_newton_step(h_KD, u_KD, ww_KK, damping, max_iterations=1000)
    error = torch.linalg.norm(gauss_newton_step(h_KD, u_KD, ww_KK, damping) - exact)
    assert error < 1e-2 * torch.linalg.norm(exact)


def test_an_unused_component_does_not_move() -> None:
    _, h_KD, w_NK, _ = problem(k=5, dim=9, seed=1)
    factors_NRD = problem(k=5, dim=9, seed=1)[0]
    w_NK[:, 2] = 0.0
    u_KD = torch.einsum("nk,nrk,nrd->kd", w_NK, factors_NRD @ h_KD.T, factors_NRD)
    step_KD = gauss_newton_step(h_KD, u_KD, w_NK.T @ w_NK, 1e-2)
    assert not step_KD[2].any()
    assert step_KD[[0, 1, 3, 4]].any(dim=1).all()


def test_the_step_vanishes_at_an_exact_factorization() -> None:
    _, h_KD, w_NK, _ = problem(k=3, dim=9, seed=2)
    # Rows √W_ij h_j factor the Fishers exactly.
    factors_NRD = w_NK.sqrt()[:, :, None] * h_KD
    u_KD = torch.einsum("nk,nrk,nrd->kd", w_NK, factors_NRD @ h_KD.T, factors_NRD)
    assert gauss_newton_step(h_KD, u_KD, w_NK.T @ w_NK, 1e-3).abs().max() < 1e-12
