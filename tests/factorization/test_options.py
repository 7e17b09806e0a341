"""Each option of the solver is the stated objective: compared with its dense definition, in float64."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from npeff.factorization import (
    ExampleShard,
    Factorization,
    IterationRecord,
    SolverOptions,
    Statistics,
    gauss_newton_step,
    initialize,
    match_components,
    nnls,
    solve,
)
from npeff.factorization.estimator import NPEFF
from npeff.options.bounds import OptionError
from npeff.runs.config_sections import FactorizationConfig
from planted import HARD_PROBLEMS, hard_problem, planted_fishers
from torch import Tensor

L1, PRESSURE = 0.05, 0.3


@pytest.fixture(scope="module")
def factors_NRD() -> Tensor:
    planted = planted_fishers(n_examples=120, rank=3, dim=20, n_components=6, noise=0.3, seed=0, n_active=3, cosine=0.4)
    return torch.from_numpy(planted.factors_NRD)


@pytest.fixture(scope="module")
def weights_N() -> Tensor:
    weights_N = torch.from_numpy(np.random.default_rng(1).uniform(0, 3, 120))
    weights_N[5:9] = 0.0
    return weights_N


def dense_objective(
    factors_NRD: Tensor, weights_N: Tensor, h_KD: Tensor, w_NK: Tensor, l1: float, orthogonality: float
) -> tuple[Tensor, Tensor]:
    """The loss and what is minimised, from D×D Fishers, as the module `objective` states them."""
    fishers = factors_NRD.mT @ factors_NRD
    norms_N = torch.linalg.matrix_norm(fishers)
    residuals = fishers - torch.einsum("nk,kd,ke->nde", w_NK, h_KD, h_KD)
    loss = (weights_N * residuals.square().sum(dim=(1, 2))).sum()
    squares = (h_KD @ h_KD.T).square()
    mean_square = (squares.sum() - squares.trace()) / (len(h_KD) * (len(h_KD) - 1))
    sparsity = 2 * l1 * (weights_N * norms_N * w_NK.sum(dim=1)).sum()
    return loss, loss + sparsity + orthogonality * (weights_N * norms_N**2).sum() * mean_square


def fitted(factors_NRD: Tensor, weights_N: Tensor | None, **options: Any) -> Factorization:
    start_KD = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shards = [
        ExampleShard(part, weights_N=None if weights_N is None else weights_N[slice_])
        for slice_ in (slice(0, 50), slice(50, None))
        for part in (factors_NRD[slice_],)
    ]
    return solve(shards, start_KD, SolverOptions(n_components=6, **{"max_iterations": 60} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_components": 0}, "n_components must be greater than 0, not 0"),
        ({"max_iterations": 0}, "max_iterations must be greater than 0, not 0"),
        ({"n_starts": 0, "subsample": -1}, "n_starts must be greater than 0, not 0; subsample must be greater than 0"),
        ({"tolerance": -1e-6}, "tolerance must be greater than or equal to 0, not -1e-06"),
        ({"l1": 1.0}, "l1 must be less than 1, not 1.0"),
        ({"l1": -0.1}, "l1 must be greater than or equal to 0, not -0.1"),
        ({"l1": math.nan}, "l1 must be a finite number, not nan"),
        ({"orthogonality": math.inf}, "orthogonality must be a finite number, not inf"),
        ({"n_frozen": -1}, "n_frozen must be greater than or equal to 0, not -1"),
        ({"n_frozen": 6}, "6 frozen components of n_components=6 leave none to fit: increase n_components"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        SolverOptions(**{"n_components": 6} | options)
    assert str(caught.value).startswith(message)
    assert str(copy.copy(caught.value)) == str(caught.value)  # made again from its arguments, as in another process


def test_a_run_file_asks_the_solver_for_what_it_says() -> None:
    said = {"n_components": 5, "max_iterations": 7, "tolerance": 1e-3, "n_starts": 2, "subsample": 9, "l1": 0.25}
    section = FactorizationConfig.model_validate(said | {"orthogonality": 0.5})
    expected = SolverOptions(**said, orthogonality=0.5, seed=3)  # type: ignore[arg-type]
    assert section.solver_options(seed=3) == expected
    assert section.solver_options(seed=3, n_frozen=2) == dataclasses.replace(expected, n_frozen=2)
    assert FactorizationConfig(n_components=5).solver_options(seed=0) == SolverOptions(n_components=5)
    own = {"seed", "n_frozen"}  # the seed is a key of its own, and the frozen components are those of `expand`
    assert {field.name for field in dataclasses.fields(SolverOptions)} - own <= set(FactorizationConfig.model_fields)


@pytest.mark.parametrize("options", [{}, {"l1": L1}, {"orthogonality": PRESSURE}, {"l1": L1, "orthogonality": 2.0}])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_and_objective_are_the_dense_ones_and_the_objective_never_rises(
    factors_NRD: Tensor, weights_N: Tensor, options: dict[str, float], weighted: bool
) -> None:
    weights = weights_N if weighted else torch.ones(120, dtype=torch.float64)
    result = fitted(factors_NRD, weights if weighted else None, **options)
    both = {"l1": 0.0, "orthogonality": 0.0} | options
    loss, objective = dense_objective(factors_NRD, weights, result.components_KD, result.coefficients_NK, **both)
    assert result.loss == pytest.approx(float(loss), rel=1e-9)
    assert result.objective == pytest.approx(float(objective), rel=1e-9)
    accepted = [record.objective for record in result.history if record.accepted]
    assert len(accepted) > 3
    assert accepted == sorted(accepted, reverse=True)
    assert result.objective <= accepted[-1] * (1 + 1e-12)
    if not options:
        assert result.objective == result.loss


@pytest.mark.parametrize("options", [{"l1": L1}, {"orthogonality": PRESSURE}, {}])
def test_the_result_is_a_stationary_point_of_the_dense_objective(
    factors_NRD: Tensor, weights_N: Tensor, options: dict[str, float]
) -> None:
    result = fitted(factors_NRD, weights_N, tolerance=1e-13, max_iterations=150, **options)
    h_KD, w_NK = result.components_KD.clone().requires_grad_(), result.coefficients_NK.clone().requires_grad_()
    both = {"l1": 0.0, "orthogonality": 0.0} | options
    unit = torch.nn.functional.normalize(h_KD, dim=1)
    _, objective = dense_objective(factors_NRD, weights_N, unit, w_NK, **both)
    gradient_KD, gradient_NK = torch.autograd.grad(objective, [h_KD, w_NK])
    assert gradient_KD.abs().max() < 2e-3
    used = weights_N > 0
    assert torch.minimum(w_NK[used], gradient_NK[used]).abs().max() < 1e-8


def test_l1_makes_coefficients_sparse_and_scales_with_the_fishers(factors_NRD: Tensor) -> None:
    plain, sparse = fitted(factors_NRD, None), fitted(factors_NRD, None, l1=0.2)
    assert (sparse.coefficients_NK > 0).sum() < 0.8 * (plain.coefficients_NK > 0).sum()
    assert sparse.loss > plain.loss
    scaled = fitted(2 * factors_NRD, None, l1=0.2)  # Fishers four times as large, in exact arithmetic
    torch.testing.assert_close(scaled.coefficients_NK, 4 * sparse.coefficients_NK, rtol=1e-6, atol=1e-8)


def test_orthogonality_lowers_the_cosines(factors_NRD: Tensor) -> None:
    def mean_square(h_KD: Tensor) -> float:
        return float((h_KD @ h_KD.T).square().triu(diagonal=1).sum())

    plain, pressed = fitted(factors_NRD, None), fitted(factors_NRD, None, orthogonality=5.0)
    assert mean_square(pressed.components_KD) < 0.5 * mean_square(plain.components_KD)


def test_integer_weights_are_repetitions(factors_NRD: Tensor) -> None:
    counts = torch.from_numpy(np.random.default_rng(0).integers(0, 3, 120))
    weighted = fitted(factors_NRD, counts.double(), l1=L1)
    repeated = solve(
        [ExampleShard(factors_NRD.repeat_interleave(counts, dim=0))],
        torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        SolverOptions(n_components=6, max_iterations=60, l1=L1),
    )
    assert weighted.objective == pytest.approx(repeated.objective, rel=1e-6)
    assert match_components(weighted.components_KD.numpy(), repeated.components_KD.numpy())[1].min() > 0.9999
    starts = [
        initialize(factors_NRD[counts > 0], 6, seed=0, weights_M=counts[counts > 0]),
        initialize(factors_NRD.repeat_interleave(counts, dim=0), 6, seed=0),
    ]
    assert match_components(*(start.numpy() for start in starts))[1].min() > 0.99


def test_the_step_solves_the_system_of_the_free_components_with_the_pressure(factors_NRD: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    h_KD = torch.nn.functional.normalize(torch.randn(6, 20, dtype=torch.float64, generator=generator), dim=1)
    factors_NRD = factors_NRD[:6]
    statistics = ExampleShard(factors_NRD).finish(h_KD)
    weight, damping, n_frozen = 7.0, 0.5, 2
    step_KD = gauss_newton_step(
        h_KD,
        statistics.u_KD,
        statistics.ww_KK,
        damping,
        orthogonality=weight,
        n_frozen=n_frozen,
        max_iterations=500,
    )
    assert not step_KD[:n_frozen].any()
    w_NK = nnls(((factors_NRD @ h_KD.T) ** 2).sum(dim=1), (h_KD @ h_KD.T) ** 2)

    def residuals(free_FD: Tensor) -> Tensor:
        h = torch.cat([h_KD[:n_frozen], free_FD])
        fit = factors_NRD.mT @ factors_NRD - torch.einsum("nk,kd,ke->nde", w_NK, h, h)
        cosines = (h @ h.T) * (1 - torch.eye(6, dtype=torch.float64))
        return torch.cat([fit.flatten(), weight**0.5 * cosines.flatten()])

    free_FD = h_KD[n_frozen:]
    jacobian = torch.autograd.functional.jacobian(residuals, free_FD, vectorize=True).reshape(-1, free_FD.numel())
    # The system is that of the normal equations, halved: damping μ is 2μ‖Δ‖² beside the squared residuals.
    normal = jacobian.T @ jacobian + 2 * damping * torch.eye(free_FD.numel(), dtype=torch.float64)
    dense = torch.linalg.solve(normal, -jacobian.T @ residuals(free_FD)).view_as(free_FD)
    torch.testing.assert_close(step_KD[n_frozen:], dense, rtol=1e-5, atol=1e-7)


def test_frozen_components_stay_and_the_others_find_the_rest() -> None:
    planted = planted_fishers(n_examples=300, rank=3, dim=24, n_components=6, noise=0.05, seed=0, n_active=3)
    frozen_KD = torch.from_numpy(planted.components_KD[[4, 1]])
    start_KD = initialize(planted.factors_NRD, 6, seed=0, frozen_KD=frozen_KD)
    torch.testing.assert_close(start_KD[:2], frozen_KD)
    result = solve([ExampleShard(planted.factors_NRD)], start_KD, SolverOptions(n_components=6, n_frozen=2))
    torch.testing.assert_close(result.components_KD[:2], frozen_KD, rtol=0, atol=1e-14)
    assert match_components(result.components_KD.numpy(), planted.components_KD)[1].min() > 0.99


def test_a_frozen_component_that_nothing_uses_is_not_replaced() -> None:
    planted = planted_fishers(n_examples=300, rank=3, dim=24, n_components=6, noise=0.05, seed=0, n_active=3)
    factors_NRD = torch.cat([torch.from_numpy(planted.factors_NRD), torch.zeros(300, 3, 1)], dim=2)
    frozen_KD = torch.eye(25, dtype=torch.float64)[24:]
    start_KD = initialize(factors_NRD, 7, seed=0, frozen_KD=frozen_KD)
    result = solve([ExampleShard(factors_NRD)], start_KD, SolverOptions(n_components=7, n_frozen=1))
    assert torch.equal(result.components_KD[:1], frozen_KD)
    assert not result.coefficients_NK[:, 0].any()
    assert not any(record.n_dead for record in result.history)


def test_the_packed_statistics_keep_the_penalty() -> None:
    statistics = dataclasses.replace(Statistics.zeros(2, 3), coefficient_sum=4.5)
    assert Statistics.unpack(statistics.pack(), 2, 3).coefficient_sum == 4.5
    assert statistics.merge(statistics).coefficient_sum == 9.0


def test_the_estimator_hands_its_options_on(factors_NRD: Tensor, weights_N: Tensor) -> None:
    records: list[IterationRecord] = []
    options = {"n_components": 6, "l1": L1, "orthogonality": PRESSURE, "normalize": False, "random_state": 0}
    model = NPEFF(**options, callbacks=[records.append]).fit(factors_NRD, sample_weight=weights_N)
    h_KD, w_NK = torch.from_numpy(model.components_), torch.from_numpy(model.coefficients_)
    loss, objective = dense_objective(factors_NRD, weights_N, h_KD, w_NK, L1, PRESSURE)
    assert model.loss_ == pytest.approx(float(loss))
    assert model.objective_ == pytest.approx(float(objective))
    assert records == model.history_
    np.testing.assert_allclose(model.transform(factors_NRD), model.coefficients_, atol=1e-8)
    again = NPEFF(**options, frozen_components=model.components_[:3], start_components=model.components_, max_iter=3)
    again.fit(factors_NRD, sample_weight=weights_N)
    np.testing.assert_allclose(again.components_[:3], model.components_[:3], atol=1e-12)
    assert again.objective_ <= model.objective_ * (1 + 1e-9)


@pytest.mark.parametrize("name", HARD_PROBLEMS)
def test_hard_planted_problems_are_solved(name: str) -> None:
    planted, n_components = hard_problem(name, seed=0, n_examples=1000, dim=128, n_components=24)
    model = NPEFF(n_components=n_components, random_state=0).fit(planted.factors_NRD.astype(np.float32))
    assert match_components(model.components_, planted.components_KD)[1].mean() >= 0.98
