"""Directions of components of diagonals, against their definition with dense matrices in float64."""

from __future__ import annotations

import pytest
import torch
from directions.test_lift import call, correlated_problem, flat, identity
from npeff.directions import (
    accumulate_diagonals,
    cosine,
    diagonal_weights,
    fisher_weighted,
    principal_direction,
    sign_weights,
    zero_directions,
)
from npeff.fisher import GroupLayout, PerExampleFishers
from npeff.gradients import GradientCollector, ParameterLayout, select_parameters
from npeff.models.predictions import kl_divergence
from npeff.verification import moved
from torch import Tensor, nn


def factors_of(model: nn.Module, inputs: Tensor, layout: ParameterLayout) -> tuple[Tensor, Tensor]:
    """Normalised rows Â (N, R, P), and norms."""
    batch = PerExampleFishers(model, call, layout, identity(model))(inputs)
    return batch.factors_BRD / batch.frobenius_norms_B.sqrt()[:, None, None], batch.frobenius_norms_B


def test_the_sums_are_those_of_their_definition_for_any_batches_and_blocks() -> None:
    torch.manual_seed(1)
    model, inputs, coefficients, _ = correlated_problem()
    coefficients[4] = 0
    layout, lengths = select_parameters(model), 0.5 + torch.rand(30).double()
    lengths[7] = 0
    factors, norms = factors_of(model, inputs, layout)
    diagonals_NP = factors.square().sum(1) * norms[:, None]
    scaled_NP = diagonals_NP * lengths.reciprocal().where(lengths > 0, 0)[:, None]
    expected = torch.linalg.pinv(coefficients) @ scaled_NP
    directions = torch.randn(3, layout.size).double()
    fishers = torch.einsum("nrp,nrq->npq", factors, factors)
    powered = torch.einsum("nk,npq,kq->kp", coefficients, fishers, directions)
    found, signed = [], []
    gram = coefficients.T @ coefficients
    for block in ([2, 0], [1]):
        weights = diagonal_weights(coefficients, gram, block, lengths)
        of_sum = diagonal_weights(torch.ones(30, 1), torch.ones(1, 1), [0], lengths)
        weights = torch.cat([weights, of_sum])
        row_weights = sign_weights(factors, coefficients[:, block], directions[block], norms)
        collector = GradientCollector(model, call, layout)
        diagonals, gradients = (zero_directions(layout, n, dtype=torch.float64) for n in (len(block) + 1, len(block)))
        for batch in (slice(0, 13), slice(13, 30)):
            parts = weights[:, batch], row_weights[:, batch]
            accumulate_diagonals(collector, inputs[batch], *parts, diagonals, gradients)
        torch.testing.assert_close(flat(diagonals, layout)[-1], scaled_NP.sum(0), rtol=1e-10, atol=1e-14)
        found.append(flat(diagonals, layout)[:-1])
        signed.append(flat(gradients, layout))
    torch.testing.assert_close(torch.cat(found), expected[[2, 0, 1]], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(torch.cat(signed), powered[[2, 0, 1]], rtol=1e-9, atol=1e-13)


def test_an_example_that_is_not_finite_does_no_harm_at_weight_zero() -> None:
    torch.manual_seed(1)
    model, inputs, _, _ = correlated_problem()
    layout = select_parameters(model)
    weights, row_weights = torch.randn(2, 30).double(), torch.randn(2, 30, 3).double()
    weights[:, 7], row_weights[:, 7] = 0, 0
    sums = []
    for value in (0.0, torch.nan):
        inputs[7] = value
        collector, found = GradientCollector(model, call, layout), [zero_directions(layout, 2) for _ in range(2)]
        accumulate_diagonals(collector, inputs, weights, row_weights, *found)
        accumulate_diagonals(collector, inputs, torch.zeros(2, 30), torch.zeros(2, 30, 3), *found)
        sums.append(torch.cat([flat(each, layout) for each in found]))
    assert torch.equal(sums[0], sums[1])
    assert sums[0].any(1).all()


def test_the_principal_direction_is_that_of_the_dense_matrix() -> None:
    torch.manual_seed(0)
    factors, coefficients = torch.randn(9, 2, 7).double(), torch.rand(9).double()
    dense = torch.einsum("n,nrp,nrq->pq", coefficients, factors, factors)
    expected = torch.linalg.eigh(dense).eigenvectors[:, -1]
    assert abs(abs(float(principal_direction(factors, coefficients) @ expected)) - 1) < 1e-12
    assert not principal_direction(factors, torch.zeros(9)).any()
    assert principal_direction(factors[:0], torch.zeros(0)).tolist() == [0.0] * 7


def test_the_principal_direction_is_the_same_by_the_smaller_of_its_two_gram_matrices() -> None:
    torch.manual_seed(0)
    factors, coefficients = torch.randn(3, 2, 7).double(), torch.rand(3).double()
    wide = principal_direction(factors, coefficients)
    tall = principal_direction(torch.cat([factors, torch.zeros(9, 2, 7)]), torch.cat([coefficients, torch.ones(9)]))
    assert abs(abs(float(wide @ tall)) - 1) < 1e-12


def test_entries_go_far_where_the_component_matters_and_little_else_does() -> None:
    diagonal = {"a": torch.tensor([4.0, 4.0, -1e-9, 1.0]), "b": torch.tensor([[9.0]])}
    gradient = {"a": torch.tensor([1e-30, -5.0, 3.0, 0.0]), "b": torch.tensor([[-1e9]])}
    mean = {"a": torch.tensor([1.0, 4.0, 0.0, 2.0]), "b": torch.tensor([[3.0]])}  # whose mean is 2
    found = fisher_weighted(diagonal, gradient, mean)
    torch.testing.assert_close(found["a"], torch.tensor([2 / 3, -2 / 6, 0.0, 0.0]))
    torch.testing.assert_close(found["b"], torch.tensor([[-3 / 5]]))
    nothing = {name: torch.zeros_like(tensor) for name, tensor in diagonal.items()}
    assert not any(tensor.any() for tensor in fisher_weighted(nothing, gradient, nothing).values())


def test_groups_of_a_tensor_are_added_up_as_those_of_the_diagonals_are() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Conv2d(2, 3, 2))
    model.scale = nn.Parameter(torch.tensor(2.0))
    layout = select_parameters(model, include=["*"])
    groups = GroupLayout.of(model, layout)
    tensors = {name: torch.rand(shape) for name, shape in zip(layout.names, layout.shapes, strict=True)}
    sums = dict(zip(groups.names(), groups.sums(tensors).tolist(), strict=True))
    for name, expected in (
        (("0.weight", 1), tensors["0.weight"][:, 1].sum()),
        (("1.weight", 2), tensors["1.weight"][2].sum() + tensors["1.bias"][2]),
        (("2.weight", 0), tensors["2.weight"][0].sum() + tensors["2.bias"][0]),
        (("scale", 0), tensors["scale"]),
    ):
        assert sums[name] == pytest.approx(float(expected), rel=1e-6)


def test_a_planted_component_moves_its_own_examples_along_the_signs_that_they_share() -> None:
    """Binary logits θ·x, with groups of examples that read inputs of their own, each with its own pattern of signs. The
    diagonal forgets the signs; a step with the wrong ones moves much less."""
    torch.manual_seed(0)
    model = nn.Linear(24, 2, bias=False).double()
    with torch.no_grad():
        model.weight *= 0.1
    member_N = torch.arange(60) % 3
    signs_24 = torch.randn(24).sign().double()
    inputs = torch.zeros(60, 24).double()
    for row, member in zip(inputs, member_N.tolist(), strict=True):
        row[8 * member : 8 * member + 8] = (0.5 + torch.rand(8).double()) * signs_24[8 * member : 8 * member + 8]
    layout = select_parameters(model)
    coefficients = nn.functional.one_hot(member_N, 3).double()
    factors, norms = factors_of(model, inputs, layout)
    lengths = (factors.square().sum(1) * norms[:, None]).norm(dim=1)
    found = torch.stack([principal_direction(factors, coefficients[:, j]) for j in range(3)])
    gram = coefficients.T @ coefficients
    weights = torch.cat(
        [
            diagonal_weights(coefficients, gram, range(3), lengths),
            diagonal_weights(torch.ones(60, 1), torch.ones(1, 1), [0], lengths),
        ]
    )
    diagonals, gradients = (zero_directions(layout, n, dtype=torch.float64) for n in (4, 3))
    row_weights = sign_weights(factors, coefficients, found, norms)
    accumulate_diagonals(GradientCollector(model, call, layout), inputs, weights, row_weights, diagonals, gradients)
    mean = {name: tensor[3] for name, tensor in diagonals.items()}
    before = call(model, inputs).detach()
    for j in range(3):
        diagonal = {name: tensor[j] for name, tensor in diagonals.items()}
        direction = fisher_weighted(diagonal, {name: tensor[j] for name, tensor in gradients.items()}, mean)
        positive = {name: tensor.abs() for name, tensor in direction.items()}
        kls = []
        for tried in (direction, positive):
            with moved(model, tried, 0.5 / float(tried["weight"].norm())), torch.no_grad():
                kls.append(kl_divergence(call(model, inputs), before))
        own = member_N == j
        assert kls[0][own].min() > 0.01
        assert kls[0][~own].max() < 1e-12
        assert kls[0][own].mean() > 3 * kls[1][own].mean()


def test_the_cosine_with_nothing_is_zero() -> None:
    assert cosine(torch.zeros(3), torch.ones(3)) == 0
    assert cosine(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 0.0])) == -1
