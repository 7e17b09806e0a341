"""Moving parameters and finding the step that moves predictions by a stated amount."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from npeff.directions import displacement, orthogonalized, parameter_norm
from npeff.models.predictions import kl_divergence
from npeff.verification import find_step_size, moved
from torch import nn


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


def direction(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(parameter) for name, parameter in net.named_parameters() if "weight" in name}


def test_parameters_move_by_the_step_and_come_back_to_their_bits() -> None:
    net = model()
    along = direction(net)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with moved(net, along, 0.3):
        for name, parameter in net.named_parameters():
            expected = before[name] + 0.3 * along[name] if name in along else before[name]
            torch.testing.assert_close(parameter.detach(), expected)
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).double()


def unit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor / flat(tensors).norm() for name, tensor in tensors.items()}


def test_a_step_of_minus_the_displacement_leaves_nothing_along_the_direction() -> None:
    net = model()
    along, origin = unit(direction(net)), {name: torch.randn_like(p) for name, p in net.named_parameters()}
    for start in (None, origin):
        far = displacement(net, along, start)
        assert abs(far) > 0.01
        with moved(net, along, -far):
            assert displacement(net, along, start) == pytest.approx(0, abs=1e-5)
    parameters = {name: p.detach() for name, p in net.named_parameters() if name in along}
    assert displacement(net, along) == pytest.approx(float(flat(along) @ flat(parameters)), abs=1e-6)
    assert displacement(net, along, parameters) == 0


def test_a_direction_made_orthogonal_is_what_is_left_outside_the_span_of_the_others() -> None:
    net = model()
    own, *others = (unit(direction(net)) for _ in range(4))
    left = orthogonalized(own, others)
    assert left is not None
    basis = torch.linalg.qr(torch.stack([flat(other) for other in others], 1))[0]
    expected = flat(own) - basis @ (basis.T @ flat(own))
    torch.testing.assert_close(flat(left), expected / expected.norm(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(left_alone, own[name]) for name, left_alone in (orthogonalized(own, []) or {}).items())
    twice = orthogonalized(own, [others[0], others[0]])
    assert twice is not None, "the others need not be independent"
    assert flat(twice) @ flat(others[0]) == pytest.approx(0, abs=1e-6)
    mixed = unit({name: own[name] + 2 * others[0][name] for name in own})
    assert orthogonalized(mixed, [own, others[0]]) is None


def test_parameters_come_back_after_an_exception() -> None:
    net = model()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with pytest.raises(RuntimeError, match="in the middle"), moved(net, direction(net), 1e20):
        raise RuntimeError("in the middle")
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())


def test_kl_is_that_of_its_definition_in_float64() -> None:
    torch.manual_seed(1)
    moved_logits, original = torch.randn(6, 4), torch.randn(6, 4)
    p, q = moved_logits.double().softmax(-1), original.double().softmax(-1)
    torch.testing.assert_close(kl_divergence(moved_logits, original), (p * (p / q).log()).sum(-1))


def test_kl_of_equal_logits_is_zero_and_of_logits_that_are_not_finite_infinite() -> None:
    logits = torch.tensor([[0.0, 900.0], [1.0, math.nan]])
    kl = kl_divergence(logits, torch.tensor([[0.0, 900.0], [1.0, 2.0]]))
    assert kl.tolist() == [0.0, math.inf]


@pytest.mark.parametrize(
    "kl_at",
    [
        lambda step: 3.0 * step**2,
        lambda step: 1e6 * step**2,
        lambda step: min(step**4, 5.0),
        lambda step: math.inf if step > 1e-3 else 1000 * step,
        lambda step: 0.0 if step < 0.5 else step,
    ],
)
def test_the_step_size_reaches_its_target_to_one_percent_where_it_can(kl_at: Callable[[float], float]) -> None:
    for target in (0.1, 0.9):
        step = find_step_size(kl_at, target, longest=10.0)
        assert step.kl == kl_at(step.epsilon)
        if step.reached_target:
            assert abs(step.kl - target) <= 0.01 * target
    assert find_step_size(kl_at, 0.9, longest=10.0).reached_target or math.isinf(kl_at(1.0))


@pytest.mark.parametrize("power", [1.5, 2.0, 3.5])
def test_a_smooth_kl_takes_few_evaluations(power: float) -> None:
    """Each one is a forward pass of all top examples."""
    asked: list[float] = []

    def kl_at(step: float) -> float:
        asked.append(step)
        return (30.0 * step) ** power / (1 + (5.0 * step) ** power)

    assert find_step_size(kl_at, 0.1, longest=20.0).reached_target
    assert len(asked) <= 5


def test_a_target_out_of_reach_is_said_and_the_longest_step_taken() -> None:
    step = find_step_size(lambda step: 1e-9 * step, 0.1, longest=2.0)
    assert not step.reached_target
    assert step.epsilon == 2.0


def test_the_norm_is_over_the_named_parameters() -> None:
    net = model()
    norm = parameter_norm(net, {"0.weight": torch.zeros(5, 3)})
    assert norm == pytest.approx(float(net[0].weight.detach().double().norm()))  # type: ignore[index]
