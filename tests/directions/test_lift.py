from __future__ import annotations

import math

import numpy as np
import torch
from npeff.directions import accumulate_directions, lift_weights, polish_weights, row_products, zero_directions
from npeff.factorization.estimator import NPEFF
from npeff.fisher import PerExampleFishers
from npeff.gradients import GradientCollector, ParameterLayout, select_parameters
from npeff.sketches import Sketch, SketchSpec, make_sketch
from torch import Tensor, nn


def call(model: nn.Module, batch: Tensor) -> Tensor:
    logits: Tensor = model(batch)
    return logits


def flat(directions: dict[str, Tensor], layout: ParameterLayout) -> Tensor:
    return torch.cat([directions[name].flatten(1) for name in layout.names], dim=1)


def planted(n_examples: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A model whose Fishers are exactly Σ_j W_ij h_j h_jᵀ, its examples, coefficients and unit components.

    Binary logits (z, 0) with z = θ·x give F = p(1-p) x xᵀ; with x a multiple of one of K orthonormal vectors, that
    vector is the component.
    """
    model = nn.Linear(12, 2, bias=False).double()
    components_KI = torch.linalg.qr(torch.randn(12, 4).double())[0].T
    member_N = torch.arange(n_examples) % 4
    inputs = components_KI[member_N] * (0.5 + torch.rand(n_examples, 1).double())
    fishers = PerExampleFishers(model, call, select_parameters(model), identity(model))
    factors = fishers(inputs).factors_BRD[:, 0]
    components = torch.stack([factors[member_N == j][0] for j in range(4)])
    components /= components.norm(dim=1, keepdim=True)
    # normalised Fishers have unit norm, so every coefficient is 1
    return model, inputs, nn.functional.one_hot(member_N, 4).double(), components


def identity(model: nn.Module) -> Sketch:
    return make_sketch(SketchSpec("identity"), select_parameters(model), 0)


def test_at_a_planted_solution_the_lifted_direction_is_the_component() -> None:
    torch.manual_seed(0)
    model, inputs, coefficients, components = planted(40)
    layout = select_parameters(model)
    batch = PerExampleFishers(model, call, layout, identity(model))(inputs)
    normalised = batch.factors_BRD / batch.frobenius_norms_B.sqrt()[:, None, None]
    gram = coefficients.T @ coefficients
    weights = lift_weights(normalised, coefficients, components, gram, range(4), batch.frobenius_norms_B)
    collector, directions = GradientCollector(model, call, layout), zero_directions(layout, 4, dtype=torch.float64)
    for start in range(0, 40, 16):
        accumulate_directions(collector, inputs[start : start + 16], weights[:, start : start + 16], directions)
    torch.testing.assert_close(flat(directions, layout), components, rtol=0, atol=1e-12)


def correlated_problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A nonlinear model with any coefficients and components: a step that is not at a solution."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    inputs = torch.randn(30, 5).double()
    coefficients = torch.rand(30, 3).double() * (torch.rand(30, 3) > 0.5)
    components = torch.randn(3, select_parameters(model).size).double()
    return model, inputs, coefficients, components / components.norm(dim=1, keepdim=True)


def test_the_lift_is_one_alternating_least_squares_step_for_any_blocks() -> None:
    torch.manual_seed(1)
    model, inputs, coefficients, components = correlated_problem()
    layout = select_parameters(model)
    batch = PerExampleFishers(model, call, layout, identity(model))(inputs)
    normalised = batch.factors_BRD / batch.frobenius_norms_B.sqrt()[:, None, None]
    fishers = torch.einsum("nrp,nrq->npq", normalised, normalised)
    gram = coefficients.T @ coefficients
    u = torch.einsum("nk,npq,kq->kp", coefficients, fishers, components)
    expected = torch.linalg.solve(gram * (components @ components.T), u)
    found = []
    for block in ([0, 1], [2]):
        weights = lift_weights(normalised, coefficients, components, gram, block, batch.frobenius_norms_B)
        collector = GradientCollector(model, call, layout)
        directions = zero_directions(layout, len(block), dtype=torch.float64)
        accumulate_directions(collector, inputs, weights, directions)
        found.append(flat(directions, layout))
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-10, atol=1e-12)


def test_a_polishing_step_is_one_of_alternating_least_squares_in_all_parameters() -> None:
    """Whatever the directions; without a sketch it is the lift of them."""
    torch.manual_seed(1)
    model, inputs, coefficients, directions = correlated_problem()
    layout = select_parameters(model)
    collector, products = GradientCollector(model, call, layout), []
    named = {
        name: directions[:, offset : offset + math.prod(shape)].reshape(-1, *shape)
        for name, shape, offset in zip(layout.names, layout.shapes, layout.offsets, strict=True)
    }
    for batch in (slice(0, 13), slice(13, 30)):
        products.append(row_products(collector, inputs[batch], named))
    batch = PerExampleFishers(model, call, layout, identity(model))(inputs)
    norms = batch.frobenius_norms_B
    rows = torch.einsum("nrp,kp->nrk", batch.factors_BRD, directions)
    # the rows of a factor may be turned, which changes no Fisher
    torch.testing.assert_close(torch.cat(products).square().sum(1), rows.square().sum(1), rtol=1e-10, atol=1e-12)
    gram, normalised = coefficients.T @ coefficients, batch.factors_BRD / norms.sqrt()[:, None, None]
    fishers = torch.einsum("nrp,nrq->npq", normalised, normalised)
    u = torch.einsum("nk,npq,kq->kp", coefficients, fishers, directions)
    expected = torch.linalg.solve(gram * (directions @ directions.T), u)
    found = []
    for block in ([2, 0], [1]):
        parts = torch.cat(products), coefficients, directions @ directions.T, gram
        polished = zero_directions(layout, len(block), dtype=torch.float64)
        accumulate_directions(collector, inputs, polish_weights(*parts, block, norms), polished)
        found.append(flat(polished, layout))
    torch.testing.assert_close(torch.cat(found), expected[[2, 0, 1]], rtol=1e-9, atol=1e-12)


def test_at_the_end_of_a_weighted_fit_the_weighted_lift_is_the_component() -> None:
    """There the components are a fixed point of alternating least squares with the examples' weights."""
    rng = np.random.default_rng(0)
    factors, importance = rng.standard_normal((40, 2, 8)), rng.choice([0.1, 1.0, 10.0], 40)
    fit = NPEFF(3, random_state=0, tol=1e-15, max_iter=3000, normalize=False).fit(factors, sample_weight=importance)
    coefficients, components = torch.from_numpy(fit.transform(factors)), torch.from_numpy(fit.components_)
    weighted = coefficients * torch.from_numpy(importance)[:, None]
    gram, norms = weighted.T @ coefficients, torch.ones(40).double()
    weights = lift_weights(torch.from_numpy(factors), weighted, components, gram, range(3), norms)
    lifted = torch.einsum("knr,nrd->kd", weights, torch.from_numpy(factors))
    torch.testing.assert_close(lifted, components, rtol=0, atol=1e-4)


def test_weights_of_shards_are_the_weights_of_all_examples() -> None:
    torch.manual_seed(1)
    factors, norms = torch.randn(10, 2, 8), torch.rand(10).double()
    coefficients, components = torch.rand(10, 3), torch.randn(3, 8).double()
    gram = coefficients.double().T @ coefficients.double()
    whole = lift_weights(factors, coefficients, components, gram, [2, 0], norms)
    parts = [
        lift_weights(factors[part], coefficients[part], components, gram, [2, 0], norms[part])
        for part in (slice(0, 4), slice(4, 10))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-6)


def test_dead_components_and_examples_without_a_fisher_have_no_weight() -> None:
    torch.manual_seed(2)
    factors, norms = torch.randn(6, 2, 5).double(), torch.rand(6).double()
    coefficients, components = torch.rand(6, 3).double(), torch.randn(3, 5).double()
    coefficients[:, 1], norms[4] = 0, 0
    weights = lift_weights(factors, coefficients, components, coefficients.T @ coefficients, range(3), norms)
    assert weights.isfinite().all()
    assert not weights[1].any()
    assert not weights[:, 4].any()
    assert weights[0, 0].any()
    assert weights[2, 0].any()


def test_an_example_that_is_not_finite_does_no_harm_at_weight_zero() -> None:
    torch.manual_seed(1)
    model, inputs, _, _ = correlated_problem()
    layout = select_parameters(model)
    weights = torch.randn(2, 30, 3).double()
    weights[:, 7] = 0
    sums = []
    for value in (0.0, torch.nan):
        inputs[7] = value
        collector, directions = GradientCollector(model, call, layout), zero_directions(layout, 2)
        accumulate_directions(collector, inputs, weights, directions)
        accumulate_directions(collector, inputs, torch.zeros(2, 30, 3), directions)
        sums.append(flat(directions, layout))
    assert torch.equal(sums[0], sums[1])
    assert sums[0].any()
