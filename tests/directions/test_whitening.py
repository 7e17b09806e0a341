"""Whitened directions: the definition in all parameters, in float64, and what follows from it."""

from __future__ import annotations

import pytest
import torch
from npeff.directions import (
    accumulate_directions,
    lift_weights,
    lifted_sketches,
    product_sums,
    unit_sketches,
    whitening,
    zero_directions,
)
from npeff.fisher import PerExampleFishers
from npeff.gradients import GradientCollector, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn

DAMPING = 0.03


def call(model: nn.Module, batch: Tensor) -> Tensor:
    logits: Tensor = model(batch)
    return logits


def definition(directions_KP: Tensor, factors_NRP: Tensor, weights_N: Tensor, damping: float) -> Tensor:
    """Unit whitened directions (K, P): the normalized rows of Γ (M + λ m Γ)⁻¹ Ĝ, with Γ and M in all parameters."""
    gram = directions_KP @ directions_KP.T
    products = factors_NRP @ directions_KP.T
    mean = torch.einsum("n,nrk,nrl->kl", weights_N, products, products) / weights_N.sum()
    combined = gram @ torch.linalg.inv(mean + damping * mean.diagonal().mean() * gram) @ directions_KP
    return combined / combined.norm(dim=1, keepdim=True)


def directions_and_factors(n_components: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, 20, generator=generator, dtype=torch.float64)
    directions = torch.randn(n_components, 20, generator=generator, dtype=torch.float64) + shared
    factors = torch.randn(40, 2, 20, generator=generator, dtype=torch.float64) + shared
    return directions / directions.norm(dim=1, keepdim=True), factors


def whitened(directions_KP: Tensor, factors_NRP: Tensor, damping: float = DAMPING) -> Tensor:
    sums = product_sums(factors_NRP @ directions_KP.T, torch.ones(len(factors_NRP)))
    return whitening(directions_KP @ directions_KP.T, sums, damping).combinations_KK @ directions_KP


@pytest.mark.parametrize("block", [[0, 1, 2], [2, 0], [1]])
def test_the_folded_lift_is_the_definition_in_all_parameters(block: list[int]) -> None:
    """Each component is lifted on its own, and the directions are whitened with Γ and M of all parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    inputs, importance = torch.randn(30, 5).double(), torch.rand(30).double() + 0.1
    importance[7] = 0.0
    layout = select_parameters(model)
    coefficients = torch.rand(30, 3).double() * (torch.rand(30, 3) > 0.5)
    components = nn.functional.normalize(torch.randn(3, layout.size).double() + 1)
    batch = PerExampleFishers(model, call, layout, make_sketch(SketchSpec("identity"), layout, 0))(inputs)
    norms, weighted = batch.frobenius_norms_B, coefficients * importance[:, None]
    factors, gram = batch.factors_BRD / norms.sqrt()[:, None, None], coefficients.T @ weighted

    fishers = torch.einsum("nrp,nrq->npq", factors, factors)
    right_sides = torch.einsum("nk,npq,kq->kp", weighted, fishers, components)
    own = nn.functional.normalize(torch.linalg.solve(gram * (components @ components.T), right_sides))
    expected = definition(own, factors, importance, DAMPING)

    parts = [slice(0, 11), slice(11, 30)]
    lifted = sum(lifted_sketches(factors[part], weighted[part], components, gram) for part in parts)
    assert isinstance(lifted, Tensor)
    sketches, inverse_lengths = unit_sketches(lifted)
    sums = sum(product_sums(factors[part] @ sketches.T, importance[part]) for part in parts)
    assert isinstance(sums, Tensor)
    found = whitening(sketches @ sketches.T, sums, DAMPING)
    combinations = found.combinations_KK * inverse_lengths
    weights = lift_weights(factors, weighted, components, gram, block, norms, combinations)
    collector, directions = (
        GradientCollector(model, call, layout),
        zero_directions(layout, len(block), None, sums.dtype),
    )
    accumulate_directions(collector, inputs, weights, directions)
    flat = torch.cat([directions[name].flatten(1) for name in layout.names], dim=1)
    torch.testing.assert_close(flat, expected[block], rtol=1e-9, atol=1e-10)  # of unit length without normalization
    torch.testing.assert_close(found.cosines_K, (expected * own).sum(1), rtol=1e-9, atol=1e-10)
    assert float(found.cosines_K.max()) < 0.999


def test_it_is_the_step_with_the_largest_displacement_for_its_mean_kl() -> None:
    """No other step in the span has a larger ĝ_jᵀd for the same ½ dᵀ(F̄ + λm)d."""
    directions, factors = directions_and_factors(4)
    mean_fisher = torch.einsum("nrp,nrq->pq", factors, factors)
    level = (directions @ mean_fisher * directions).sum(1).mean()
    metric = mean_fisher + DAMPING * level * torch.eye(20)
    generator = torch.Generator().manual_seed(1)
    for own, step in zip(directions, whitened(directions, factors), strict=True):
        best = (own @ step) / (step @ metric @ step).sqrt()
        others = torch.randn(500, 4, generator=generator, dtype=torch.float64) @ directions
        others = torch.cat([others, step + 0.01 * others])
        assert float(((others @ own) / (others @ metric * others).sum(1).sqrt() / best).max()) < 1


def test_a_single_component_keeps_its_direction() -> None:
    directions, factors = directions_and_factors(1)
    torch.testing.assert_close(whitened(directions, factors), directions, rtol=1e-12, atol=1e-12)


def test_with_large_damping_directions_are_their_own() -> None:
    directions, factors = directions_and_factors(4)
    torch.testing.assert_close(whitened(directions, factors, 1e8), directions, rtol=0, atol=1e-5)


def test_duplicates_get_the_direction_of_their_original() -> None:
    directions, factors = directions_and_factors(3)
    twice = directions[[0, 1, 1, 2]]
    products, level = factors @ directions.T, product_sums(factors @ twice.T, torch.ones(len(factors))).trace() / 4
    mean = torch.einsum("nrk,nrl->kl", products, products)
    gram = directions @ directions.T
    expected = nn.functional.normalize(gram @ torch.linalg.inv(mean + DAMPING * level * gram) @ directions)
    torch.testing.assert_close(whitened(twice, factors), expected[[0, 1, 1, 2]], rtol=0, atol=1e-10)


def test_unused_components_have_no_direction_and_change_no_other() -> None:
    directions, factors = directions_and_factors(3)
    with_unused = torch.cat([directions[:1], torch.zeros(1, 20).double(), directions[1:]])
    sums = product_sums(factors @ with_unused.T, torch.ones(len(factors)))
    found = whitening(with_unused @ with_unused.T, sums, DAMPING)
    assert not found.combinations_KK[1].any()
    assert not found.combinations_KK[:, 1].any()
    assert found.cosines_K[1] == 0
    expected = whitened(directions, factors)
    torch.testing.assert_close((found.combinations_KK @ with_unused)[[0, 2, 3]], expected, rtol=1e-10, atol=1e-12)
    nothing = whitening(torch.zeros(2, 2), torch.zeros(2, 2), DAMPING)
    assert not nothing.combinations_KK.any()
    torch.testing.assert_close(
        unit_sketches(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))[1], torch.tensor([0, 0.2]).double()
    )


def test_lengths_of_the_sums_change_only_the_scale_of_the_damping() -> None:
    directions, factors = directions_and_factors(3)
    lengths = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)[:, None]
    sums = product_sums(factors @ directions.T, torch.ones(len(factors)))
    level = float(sums.diagonal().mean() / (lengths * sums * lengths.T).diagonal().mean())
    longer = directions * lengths
    scaled = whitening(longer @ longer.T, lengths * sums * lengths.T, DAMPING * level).combinations_KK @ longer
    torch.testing.assert_close(scaled, whitened(directions, factors), rtol=1e-9, atol=1e-11)


def test_examples_without_weight_do_not_count_and_need_not_be_finite() -> None:
    directions, factors = directions_and_factors(3)
    products = factors @ directions.T
    weights = torch.ones(len(factors))
    weights[:5] = 0
    expected = product_sums(products[5:], weights[5:])
    products[:5] = torch.nan
    torch.testing.assert_close(product_sums(products, weights), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("damping", "entry"), [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (0.1, float("nan"))])
def test_what_has_no_solution_is_refused(damping: float, entry: float) -> None:
    with pytest.raises(ValueError, match=r"damping must be positive|not finite"):
        whitening(torch.eye(2), torch.tensor([[entry, 0.0], [0.0, 1.0]]), damping)


def test_whitened_steps_change_only_their_own_examples() -> None:
    """Two groups of examples share most of their rows. Own directions change both groups alike.

    The model has two classes and the logits (θ·x, 0). At θ = 0, the Fisher factor of an example is x/2.
    """
    generator = torch.Generator().manual_seed(0)
    shared, first, second = torch.linalg.qr(torch.randn(20, 3, generator=generator, dtype=torch.float64))[0].T
    directions = nn.functional.normalize(torch.stack([2 * shared + first, 2 * shared + second]))
    factors = directions.repeat_interleave(20, 0)[:, None]
    ratios = []
    for steps in (directions, whitened(directions, factors)):
        logits_Nk = 0.5 * (2 * factors[:, 0]) @ steps.T
        moved = torch.distributions.Bernoulli(logits=logits_Nk)
        kl_Nk = torch.distributions.kl_divergence(moved, torch.distributions.Bernoulli(logits=torch.zeros(40, 2)))
        first_k, second_k = kl_Nk[:20].mean(0), kl_Nk[20:].mean(0)
        ratios.append(torch.stack([first_k[0] / second_k[0], second_k[1] / first_k[1]]))
    own, changed = ratios
    assert float(own.max()) < 1.7
    assert float(changed.min()) > 100
