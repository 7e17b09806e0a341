from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch
from npeff.factorization import accelerated_, accelerated_is_faster, descend_, hals_, nnls, sweeps_for
from npeff.factorization.nnls import largest_eigenvalue_bound
from torch import Tensor


def problem(n: int, k: int, dim: int, seed: int, collinearity: float = 0.0) -> tuple[Tensor, Tensor]:
    """Targets (n, k) with mixed signs and the Gram matrix of vectors that share a direction."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((k, dim)) + collinearity * rng.standard_normal(dim)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return torch.from_numpy(rng.standard_normal((n, dim)) @ vectors.T), torch.from_numpy(vectors @ vectors.T)


def objective(w_NK: Tensor, t_NK: Tensor, gram_KK: Tensor) -> Tensor:
    return ((w_NK @ gram_KK) * w_NK - 2 * w_NK * t_NK).sum(dim=1)


@pytest.mark.parametrize("k", [5, 32, 33, 70])
def test_hals_updates_one_component_after_the_other_whatever_their_groups(k: int) -> None:
    t_NK, gram_KK = problem(n=30, k=k, dim=50, seed=k, collinearity=1.0)
    gram_KK[3], gram_KK[:, 3] = 0.0, 0.0
    start_NK = torch.rand(30, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = start_NK.clone()
    for _ in range(2):
        for j in range(k):
            gradient_N = expected @ gram_KK[j] - t_NK[:, j]
            expected[:, j] = (expected[:, j] - gradient_N / gram_KK[j, j]).clamp(min=0.0) if j != 3 else 0.0
    found = hals_(start_NK.T.contiguous(), t_NK.T.contiguous(), gram_KK, 2).T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("collinearity", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 7, 20])
def test_nnls_equals_scipys_nnls(k: int, collinearity: float) -> None:
    t_NK, gram_KK = problem(n=50, k=k, dim=30, seed=k, collinearity=collinearity)
    # scipy solves min ‖Ax − b‖: A = chol(G)ᵀ and Aᵀb = t.
    a = torch.linalg.cholesky(gram_KK).T
    b = torch.linalg.solve_triangular(a.T, t_NK.T, upper=False).T
    expected = np.stack([scipy.optimize.nnls(a.numpy(), row.numpy())[0] for row in b])
    np.testing.assert_allclose(nnls(t_NK, gram_KK).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_nnls_does_not_depend_on_where_it_starts_and_leaves_the_start_alone() -> None:
    t_NK, gram_KK = problem(n=40, k=12, dim=30, seed=0, collinearity=1.0)
    start_NK = torch.rand(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept = start_NK.clone()
    torch.testing.assert_close(nnls(t_NK, gram_KK, start_NK), nnls(t_NK, gram_KK), rtol=1e-9, atol=1e-10)
    assert torch.equal(start_NK, kept)


def test_nnls_meets_the_optimality_conditions_when_components_coincide() -> None:
    t_NK, gram_KK = problem(n=30, k=8, dim=20, seed=1)
    doubled = torch.cat([torch.arange(8), torch.arange(4)])
    t_NK, gram_KK = t_NK[:, doubled], gram_KK[doubled][:, doubled]
    w_NK = nnls(t_NK, gram_KK)
    gradient_NK = w_NK @ gram_KK - t_NK
    assert torch.minimum(w_NK, gradient_NK).abs().max() < 1e-10


def test_more_examples_than_fit_one_block_of_supports_are_solved_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    t_NK, gram_KK = problem(n=60, k=10, dim=30, seed=2)
    expected = nnls(t_NK, gram_KK)
    monkeypatch.setitem(nnls.__globals__, "_SUPPORT_BLOCK_ELEMENTS", 64)
    torch.testing.assert_close(nnls(t_NK, gram_KK), expected, rtol=1e-11, atol=1e-12)


def test_a_component_of_zeros_gets_no_coefficient() -> None:
    t_NK, gram_KK = problem(n=20, k=6, dim=30, seed=3)
    gram_KK[2], gram_KK[:, 2], t_NK[:, 2] = 0.0, 0.0, 0.0
    others = [0, 1, 3, 4, 5]
    for w_NK in (nnls(t_NK, gram_KK), hals_(torch.ones(6, 20).double(), t_NK.T.contiguous(), gram_KK, 3).T):
        assert not w_NK[:, 2].any()
        assert w_NK[:, others].any()


def test_nnls_of_no_examples_is_empty() -> None:
    assert nnls(torch.zeros(0, 3), torch.eye(3)).shape == (0, 3)


def test_hals_equals_coordinate_descent_written_out() -> None:
    t_NK, gram_KK = problem(n=9, k=5, dim=30, seed=4)
    w_NK = np.random.default_rng(0).uniform(size=(9, 5))
    result = hals_(torch.from_numpy(w_NK.T.copy()), t_NK.T.contiguous(), gram_KK, sweeps=2)
    t, gram = t_NK.numpy(), gram_KK.numpy()
    for _ in range(2):
        for k in range(5):
            w_NK[:, k] = np.maximum(0, w_NK[:, k] + (t[:, k] - w_NK @ gram[k]) / gram[k, k])
    np.testing.assert_allclose(result.T.numpy(), w_NK, rtol=1e-13, atol=1e-14)


def test_no_sweep_raises_the_objective_of_any_example() -> None:
    t_NK, gram_KK = problem(n=40, k=12, dim=30, seed=5, collinearity=3.0)
    w_KN = torch.zeros(12, 40, dtype=torch.float64)
    losses = [objective(w_KN.T, t_NK, gram_KK)]
    for _ in range(20):
        losses.append(objective(hals_(w_KN, t_NK.T.contiguous(), gram_KK, 1).T, t_NK, gram_KK))
    falls = torch.stack(losses).diff(dim=0)
    assert falls.max() <= 1e-12
    assert falls.sum() < 0


@pytest.mark.parametrize("k", [1, 40, 70])
@pytest.mark.parametrize("collinearity", [0.0, 1.0])
def test_enough_accelerated_steps_or_sweeps_reach_the_exact_solution(k: int, collinearity: float) -> None:
    t_NK, gram_KK = problem(n=10, k=k, dim=200, seed=k, collinearity=collinearity)
    expected = nnls(t_NK, gram_KK)
    start_KN = torch.rand(k, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for method, count in ((accelerated_, 1500), (hals_, 300)):
        found = method(start_KN.clone(), t_NK.T.contiguous(), gram_KK, count).T
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


def test_accelerated_steps_raise_no_objective_however_few() -> None:
    t_NK, gram_KK = problem(n=200, k=12, dim=30, seed=5, collinearity=3.0)
    start_KN = nnls(t_NK, gram_KK).T.contiguous() + 1e-3
    before = objective(start_KN.T, t_NK, gram_KK)
    for steps in (1, 2, 7):
        after = objective(accelerated_(start_KN.clone(), t_NK.T.contiguous(), gram_KK, steps).T, t_NK, gram_KK)
        assert (after <= before).all()
        assert (after < before).any()


def test_accelerated_steps_leave_a_component_of_zeros_without_coefficient() -> None:
    t_NK, gram_KK = problem(n=20, k=6, dim=30, seed=3)
    gram_KK[2], gram_KK[:, 2], t_NK[:, 2] = 0.0, 0.0, 0.0
    assert not accelerated_(torch.ones(6, 20).double(), t_NK.T.contiguous(), gram_KK, 5)[2].any()


def test_the_bound_on_eigenvalues_holds_and_is_close_for_non_negative_matrices() -> None:
    for seed in range(5):
        _, gram_KK = problem(n=1, k=30, dim=40, seed=seed, collinearity=1.0)
        assert largest_eigenvalue_bound(gram_KK) >= float(torch.linalg.eigvalsh(gram_KK)[-1])
        exact = float(torch.linalg.eigvalsh(gram_KK.square())[-1])
        assert exact <= largest_eigenvalue_bound(gram_KK.square()) <= 1.05 * exact


def test_the_cost_rule_prefers_products_where_launches_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    assert accelerated_is_faster("cuda", 256, 20_000)
    assert not accelerated_is_faster("cpu", 256, 1365)
    assert sweeps_for(torch.eye(8)) < sweeps_for(torch.full((8, 8), 0.6) + 0.4 * torch.eye(8))
    t_NK, gram_KK = problem(n=20, k=6, dim=30, seed=3, collinearity=1.0)
    start_KN, t_KN = torch.zeros(6, 20, dtype=torch.float64), t_NK.T.contiguous()
    assert torch.equal(descend_(start_KN.clone(), t_KN, gram_KK, 3), hals_(start_KN.clone(), t_KN, gram_KK, 3))
    monkeypatch.setitem(descend_.__globals__, "accelerated_is_faster", lambda *_: True)
    chosen = descend_(start_KN.clone(), t_KN, gram_KK, 3)
    assert torch.equal(chosen, accelerated_(start_KN.clone(), t_KN, gram_KK, 12))
