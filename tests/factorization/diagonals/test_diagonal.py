"""D-NPEFF: passes and steps against their definitions in dense float64, and what the solver finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from npeff.factorization import (
    DiagonalShard,
    DiagonalState,
    DiagonalStatistics,
    InvalidProblemError,
    SolverOptions,
    advance_diagonal,
    diagonal_stopping_reason,
    initial_diagonal_state,
    initialize_diagonal,
    match_components,
    solve_diagonal,
    step_diagonal,
)
from npeff.factorization.diagonals import shard as diagonal_module
from npeff.factorization.diagonals import solver as solver_module
from npeff.factorization.diagonals.estimator import DiagonalNPEFF
from scipy.optimize import nnls
from sklearn.base import clone
from sklearn.decomposition import NMF
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor

K = 5


def planted(n: int = 120, p: int = 40, noise: float = 0.01, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows X (N, P), two active components each, and the sparse components (K, P)."""
    rng = np.random.default_rng(seed)
    h_KP = rng.random((K, p)) * (rng.random((K, p)) < 0.3)
    w_NK = rng.uniform(0.2, 1, (n, K)) * (rng.random((n, K)).argsort(axis=1) < 2)
    x_NP = w_NK @ h_KP + noise * rng.random((n, p))
    return x_NP / np.linalg.norm(x_NP, axis=1, keepdims=True), h_KP


def truncated(x_NP: np.ndarray, kept: int = 8) -> scipy.sparse.csr_array:
    """Each row's largest entries."""
    smallest = np.sort(x_NP, axis=1)[:, -kept, None]
    return scipy.sparse.csr_array(np.where(x_NP >= smallest, x_NP, 0))


def start(p: int = 40, seed: int = 1) -> Tensor:
    return torch.rand(K, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["dense", "sparse"])
def data(request: pytest.FixtureRequest) -> Any:
    x_NP = planted()[0]
    return x_NP if request.param == "dense" else truncated(x_NP)


def dense(data: Any) -> np.ndarray:
    return data.toarray() if scipy.sparse.issparse(data) else data


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_pass_is_coordinate_descent_and_its_statistics_are_their_definitions(data: Any, dtype: Any) -> None:
    shard, h_KP = DiagonalShard(data.astype(dtype)), start().to(torch.from_numpy(np.zeros(0, dtype)))
    statistics = shard.accumulate(h_KP, sweeps=2)
    shard.settle(True)
    x, h, w = dense(data), h_KP.double().numpy(), np.zeros((120, K))
    for _ in range(2):
        for k in range(K):
            w[:, k] = np.maximum(0, w[:, k] + (x - w @ h) @ h[k] / (h[k] @ h[k]))
    tolerance = 1e-12 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(shard.coefficients_NK.numpy(), w, atol=tolerance)
    np.testing.assert_allclose(statistics.wx_KP.numpy(), w.T @ x, atol=120 * tolerance)
    np.testing.assert_allclose(statistics.ww_KK.numpy(), w.T @ w, atol=120 * tolerance)
    np.testing.assert_allclose(shard.misfits_N.numpy(), np.square(x - w @ h).sum(1), atol=tolerance)
    other = start(seed=2)
    expected = np.square(x - w @ other.numpy()).sum()
    assert statistics.loss(other) == pytest.approx(expected, rel=10 * tolerance)
    assert shard.coefficients_NK.dtype == h_KP.dtype


def test_blocks_and_slabs_change_nothing(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = solve_diagonal([DiagonalShard(data)], start(), SolverOptions(n_components=K, max_iterations=8))
    monkeypatch.setattr(diagonal_module, "_BLOCK_EXAMPLES", 50)
    monkeypatch.setattr(diagonal_module, "SLAB_COLUMNS", 7)
    monkeypatch.setattr(solver_module, "SLAB_COLUMNS", 7)
    cut = solve_diagonal([DiagonalShard(data)], start(), SolverOptions(n_components=K, max_iterations=8))
    torch.testing.assert_close(whole.components_KD, cut.components_KD, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(whole.coefficients_NK, cut.coefficients_NK, rtol=1e-9, atol=1e-12)


def test_the_result_is_a_stationary_point_with_optimal_coefficients(data: Any) -> None:
    options = SolverOptions(n_components=K, max_iterations=3000, tolerance=1e-13)
    result = solve_diagonal([DiagonalShard(data)], start(), options)
    x, h, w = dense(data), result.components_KD.numpy(), result.coefficients_NK.numpy()
    assert result.loss == pytest.approx(np.square(x - w @ h).sum(), rel=1e-9)
    assert result.explained == pytest.approx(1 - result.loss / np.square(x).sum(), abs=1e-12)
    np.testing.assert_allclose(np.linalg.norm(h, axis=1), 1, rtol=1e-12)
    np.testing.assert_allclose(w, np.stack([nnls(h.T, row)[0] for row in x]), atol=1e-7)
    gradient_KP = w.T @ (w @ h - x)
    assert np.abs(np.minimum(h, gradient_KP)).max() < 1e-4
    energy_K = np.square(w).sum(0)
    assert (np.diff(energy_K) <= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_planted_components_are_found_and_shards_do_not_matter(seed: int) -> None:
    x_NP, h_KP = planted(n=300, noise=0.0, seed=seed)
    options = SolverOptions(n_components=K, max_iterations=400)
    start_KP = initialize_diagonal(x_NP, K, seed)
    results = [
        solve_diagonal([DiagonalShard(part) for part in np.array_split(x_NP, n)], start_KP, options) for n in (1, 3)
    ]
    assert match_components(results[0].components_KD.numpy(), h_KP)[1].min() > 0.98
    assert results[0].explained > 0.9995
    for one, three in zip(results[0].history, results[1].history, strict=False):
        assert one.loss == pytest.approx(three.loss, rel=1e-6, abs=1e-6 * 300)


def test_in_single_precision_what_is_explained_is_equal_to_1e_6_however_the_examples_are_cut() -> None:
    x_NP = planted(n=1000, p=200, noise=0.3)[0].astype(np.float32)
    # half of the steps after which single precision ends the runs, some sooner than others
    options = SolverOptions(n_components=K, max_iterations=24, tolerance=0.0)
    shares = []
    for n in (1, 2, 4):
        shards = [DiagonalShard(part) for part in np.array_split(x_NP, n)]
        shares.append([record.explained for record in solve_diagonal(shards, start(200).float(), options).history])
    assert [len(each) for each in shares] == [24] * 3
    np.testing.assert_allclose(shares[1], shares[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(shares[2], shares[0], rtol=0, atol=1e-6)


def test_the_loss_is_no_higher_than_coordinate_descents(data: Any) -> None:
    model = DiagonalNPEFF(n_components=K, random_state=0, normalize=False).fit(data)
    for init in ("nndsvd", "nndsvda"):
        other = NMF(K, init=init, tol=1e-6, max_iter=2000).fit(data)
        assert model.loss_ <= other.reconstruction_err_**2 * (1 + 1e-4)


def test_the_loss_never_rises_over_accepted_steps_and_rejected_ones_go_back(data: Any) -> None:
    options = SolverOptions(n_components=K, max_iterations=60, tolerance=0.0)
    shard, state = DiagonalShard(data), initial_diagonal_state(start(), options)
    losses, n_rejected = [], 0
    for _ in range(60):
        before_NK, before = shard.coefficients_NK, state
        state, record = step_diagonal([shard], state, options)
        if record.accepted:
            losses.append(record.loss)
            continue
        n_rejected += 1
        assert shard.coefficients_NK is before_NK
        assert state.components_KP is before.best_components_KP
        assert state.plain
        assert before.plain or state.weight < before.weight
    assert losses == sorted(losses, reverse=True)
    assert n_rejected > 0


def test_extrapolation_pays() -> None:
    x_NP = planted(n=300, noise=0.1)[0]
    options = SolverOptions(n_components=K, max_iterations=60, tolerance=0.0)
    fast = solve_diagonal([DiagonalShard(x_NP)], start(), options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solver_module, "_FIRST_EXTRAPOLATION", 0.0)
        plain = solve_diagonal([DiagonalShard(x_NP)], start(), options)
    assert all(record.accepted for record in plain.history[:20])
    assert fast.loss < plain.loss


def test_a_run_continued_from_its_arrays_is_identical(data: Any) -> None:
    # Up to 18 steps: whether a step near convergence still lowers the loss is decided by rounding, which differs
    # between processors. The two runs multiply matrices of the same shapes, so that their bits are equal on any.
    options = SolverOptions(n_components=K, max_iterations=19, tolerance=0.0)
    shard, state = DiagonalShard(data), initial_diagonal_state(start(), options)
    for _ in range(9):
        state, _ = step_diagonal([shard], state, options)
    resumed = DiagonalState.from_arrays(state.to_arrays())
    again = DiagonalShard(data, shard.coefficients_NK.numpy())
    for _ in range(9):
        state, record = step_diagonal([shard], state, options)
        resumed, same = step_diagonal([again], resumed, options)
        assert record == same
    assert torch.equal(state.components_KP, resumed.components_KP)
    assert diagonal_stopping_reason(state, options) is None
    assert diagonal_stopping_reason(state, dataclasses.replace(options, max_iterations=18)) == "max_iterations"


def test_a_dead_component_takes_up_what_is_missing_in_the_worst_fitted_examples(data: Any) -> None:
    start_KP = start()
    start_KP[2] = 0.0
    options = SolverOptions(n_components=K, max_iterations=200)
    shard, state = DiagonalShard(data), initial_diagonal_state(start_KP, options)
    state, record = step_diagonal([shard], state, options)
    assert record.n_dead == 1
    x_P = dense(data)[int(shard.misfits_N.argmax())]
    w_K = shard.coefficients_NK[int(shard.misfits_N.argmax())].numpy()
    missing_P = np.maximum(0, x_P - w_K @ start_KP.numpy())
    np.testing.assert_allclose(state.components_KP[2].numpy(), missing_P / np.linalg.norm(missing_P), atol=1e-9)
    alive = solve_diagonal([DiagonalShard(data)], start_KP, options)
    assert (alive.coefficients_NK.square().sum(0) > 0).all()


def test_packed_statistics_add_up(data: Any) -> None:
    parts = [DiagonalShard(data[rows]).accumulate(start()) for rows in (slice(0, 50), slice(50, None))]
    packed = parts[0].pack() + parts[1].pack()
    found = DiagonalStatistics.unpack(packed, K, 40)
    merged = parts[0].merge(parts[1])
    assert torch.equal(found.wx_KP, merged.wx_KP)
    assert torch.equal(found.ww_KK, merged.ww_KK)
    assert (found.fisher_square_sum, found.n_examples) == (merged.fisher_square_sum, 120)


def test_starts_depend_on_the_arguments_only_and_are_unit_rows(data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from npeff.factorization.diagonals import initialization as diagonal_initialization

    polished, tried = diagonal_initialization._polished, []

    def seen(fishers_MP: Any, start_KP: torch.Tensor, most: int) -> Any:
        found = polished(fishers_MP, start_KP, most)
        tried.append((fishers_MP.shape[1], start_KP, found[1].best_loss))
        return found

    monkeypatch.setattr(diagonal_initialization, "_MOST_COLUMNS", 10)
    monkeypatch.setattr(diagonal_initialization, "_polished", seen)
    start_KP = initialize_diagonal(data, K, seed=3)
    (_, of_part_KP, loss_of_part), (_, nndsvd_KP, loss_of_nndsvd) = [each for each in tried if each[0] > 10]
    heaviest = np.sort(np.argsort(-np.square(dense(data)).sum(0))[:10])
    assert set(of_part_KP.any(0).nonzero()[:, 0].tolist()) <= set(heaviest.tolist())
    torch.testing.assert_close(nndsvd_KP, expected_nndsvd(dense(data)), rtol=1e-4, atol=1e-4)
    shard = DiagonalShard(data)
    shard.finish(start_KP)
    assert float(shard.misfits_N.sum()) <= min(loss_of_part, loss_of_nndsvd) * (1 + 1e-6), "the better one is it"
    assert torch.equal(start_KP, initialize_diagonal(data, K, seed=3))
    torch.testing.assert_close(start_KP.norm(dim=1), torch.ones(K, dtype=torch.float64))
    assert (start_KP >= 0).all()


def expected_nndsvd(x_NP: np.ndarray) -> torch.Tensor:
    """H of NNDSVD by an exact decomposition, its rows divided by their lengths."""
    u, _, v = np.linalg.svd(x_NP, full_matrices=False)
    rows = []
    for left, right in zip(u.T[:K], v[:K], strict=True):
        parts = [(np.maximum(sign * left, 0), np.maximum(sign * right, 0)) for sign in (1, -1)]
        row = max(parts, key=lambda pair: np.linalg.norm(pair[0]) * np.linalg.norm(pair[1]))[1]
        rows.append(row / np.linalg.norm(row))
    return torch.from_numpy(np.array(rows))


def test_more_components_than_columns_are_started() -> None:
    x_NP = planted(p=3)[0]
    assert initialize_diagonal(x_NP, K, seed=0).shape == (K, 3)
    assert DiagonalNPEFF(K, random_state=0).fit(x_NP).explained_ > 0.99


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (np.full((3, 4), -1.0), "negative"),
        (np.array([[1.0, 0.0], [np.nan, 0.0]]), "example 1 is not finite"),
        (np.ones((3, 4), int), "floating-point"),
        (np.ones((3, 4, 5)), "matrix"),
    ],
)
def test_what_is_no_diagonal_fisher_is_refused(broken: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidProblemError, match=message):
        DiagonalShard(broken)


def test_impossible_problems_are_refused() -> None:
    options = SolverOptions(n_components=2)
    with pytest.raises(InvalidProblemError, match="every diagonal Fisher is zero"):
        initialize_diagonal(np.zeros((4, 3)), 2, seed=0)
    with pytest.raises(InvalidProblemError, match="every diagonal Fisher is zero"):
        solve_diagonal([DiagonalShard(np.zeros((4, 3)))], torch.ones(2, 3).double(), options)
    with pytest.raises(InvalidProblemError, match="exceeds the 4 factor rows"):
        initialize_diagonal(np.ones((4, 3)), 5, seed=0)
    with pytest.raises(InvalidProblemError, match="do not fit"):
        initial_diagonal_state(torch.ones(3, 3), options)
    with pytest.raises(InvalidProblemError, match="non-negative"):
        initial_diagonal_state(-torch.ones(2, 3), options)
    state = initial_diagonal_state(torch.ones(2, 3).double(), options)
    statistics = DiagonalShard(np.ones((4, 3))).accumulate(state.components_KP)
    statistics.wx_KP[0, 0] = np.nan
    with pytest.raises(InvalidProblemError, match="out of range"):
        advance_diagonal(state, statistics, options)


@parametrize_with_checks([DiagonalNPEFF(n_components=2, max_iter=30)])
def test_every_check_of_scikit_learn_passes(estimator: DiagonalNPEFF, check: Callable[[Any], None]) -> None:
    check(estimator)


def test_the_score_is_what_is_explained_of_held_out_diagonals(data: Any) -> None:
    matrix = dense(data)
    model = DiagonalNPEFF(n_components=K, random_state=0).fit(matrix[:80])
    assert model.score(matrix[:80]) == pytest.approx(model.explained_, rel=1e-6)
    held_out = matrix[80:] / np.linalg.norm(matrix[80:], axis=1, keepdims=True)
    squares = ((held_out - model.inverse_transform(model.transform(matrix[80:]))) ** 2).sum(axis=1)
    assert model.score(matrix[80:]) == pytest.approx(1 - squares.mean(), rel=1e-5)
    weights = np.linspace(0, 1, 40)
    expected = 1 - (weights * squares).sum() / weights.sum()
    assert model.score(scipy.sparse.csr_array(matrix[80:]), sample_weight=weights) == pytest.approx(expected, rel=1e-5)
    search = GridSearchCV(DiagonalNPEFF(random_state=0, n_starts=1, max_iter=50), {"n_components": [1, K]}, cv=2)
    assert search.fit(matrix).best_params_ == {"n_components": K}
    with pytest.raises(ValueError, match="Negative values"):
        model.inverse_transform(-np.ones((1, K)))


def test_sparse_and_dense_input_give_the_same(data: Any) -> None:
    model = DiagonalNPEFF(n_components=K, random_state=0)
    coefficients_NK = model.fit_transform(data)
    other = clone(model).fit(scipy.sparse.csc_array(dense(data)))
    np.testing.assert_allclose(other.coefficients_, coefficients_NK, atol=1e-5)
    np.testing.assert_allclose(model.transform(data), coefficients_NK, atol=1e-9)
    np.testing.assert_allclose(model.transform(data[7:9]), coefficients_NK[7:9], atol=1e-9)
    assert model.inverse_transform(coefficients_NK).shape == (120, 40)
    scaled = clone(model).fit(dense(data) * np.linspace(1, 5, 120)[:, None])
    assert scaled.loss_ == pytest.approx(model.loss_, rel=1e-5)
    assert model.get_feature_names_out().tolist() == [f"diagonalnpeff{k}" for k in range(K)]
    with pytest.raises(ValueError, match="Negative values"):
        model.transform(-dense(data))
