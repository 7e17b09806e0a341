"""FAdam is its definition in float64, and an optimizer of torch in every other respect."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.training import FAdam, TrainingError, fadam
from safetensors.torch import save_file
from torch import Tensor, nn

SHAPES = ((7, 5), (5,), (), (3, 2, 4))
STEPS = 20


def start(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    return [nn.Parameter(value.to(dtype)) for value in values]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of different sizes, so that some tensors are clipped, with an entry that is always zero."""
    generator = torch.Generator().manual_seed(step + 1)
    found = []
    for number, shape in enumerate(SHAPES):
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (number + 3 * (step == 12))
        value.view(-1)[-1] *= float(value.numel() == 1)
        found.append(value.to(dtype))
    return found


def train(optimizer: FAdam, parameters: list[nn.Parameter], steps: range, factor: float = 1.0) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, gradients(step, parameters[0].dtype), strict=True):
            parameter.grad = factor * gradient
        optimizer.step()


def by_definition(
    theta: Tensor,
    gradients: list[Tensor],
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    epsilon: str = "rms",
    clip: float | None = 1.0,
    power: float = 0.5,
    weight_decay: float = 0.1,
    debias_momentum: bool = False,
) -> tuple[Tensor, Tensor]:
    """One tensor, line by line. Returns the parameter and f."""

    def limited(value: Tensor) -> Tensor:
        rms = value.square().mean().sqrt().item()
        return value if clip is None else value / max(1.0, rms / clip)

    theta, f, m = theta.clone(), torch.zeros_like(theta), torch.zeros_like(theta)
    for t, g in enumerate(gradients, start=1):
        beta2 = betas[1] * (1 - betas[1] ** (t - 1)) / (1 - betas[1] ** t)
        f = beta2 * f + (1 - beta2) * g**2
        rms = g.square().mean().sqrt().item()
        smallest = min(eps, 0.01 * rms) if epsilon == "rms" and rms > 0 else eps
        denominator = f**power + smallest ** (2 * power)
        m = betas[0] * m + (1 - betas[0]) * limited(g / denominator)
        momentum = m / (1 - betas[0] ** t) if debias_momentum else m
        theta = theta - lr * (momentum + weight_decay * limited(theta / denominator))
    return theta, f


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"eps": 0.5},
        {"epsilon": "fixed", "eps": 0.5},
        {"clip": 0.3, "weight_decay": 0.02, "betas": (0.8, 0.95)},
        {"clip": None, "weight_decay": 0.0},
        {"power": 0.7, "eps": 1e-4},
        {"debias_momentum": True, "lr": 0.03},
    ],
    ids=str,
)
@pytest.mark.parametrize("piece", [4, fadam._PIECE])
def test_twenty_steps_are_the_definition(options: dict[str, Any], piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fadam, "_PIECE", piece)  # 4: the first, second and last tensor are updated in pieces
    parameters = start()
    optimizer = FAdam(parameters, **options)
    train(optimizer, parameters, range(STEPS))
    for number, (parameter, before) in enumerate(zip(parameters, start(), strict=True)):
        expected, f = by_definition(before.detach(), [gradients(step)[number] for step in range(STEPS)], **options)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[parameter]["fisher"], f, rtol=1e-12, atol=0)


def test_the_fisher_is_the_debiased_second_moment_of_adam() -> None:
    parameters, others = start(), start()
    optimizer, adam = FAdam(parameters), torch.optim.Adam(others)
    train(optimizer, parameters, range(STEPS))
    train(adam, others, range(STEPS))  # type: ignore[arg-type]
    for parameter, other in zip(parameters, others, strict=True):
        v = adam.state[other]["exp_avg_sq"] / (1 - 0.999**STEPS)
        torch.testing.assert_close(optimizer.state[parameter]["fisher"], v, rtol=1e-12, atol=0)


@pytest.mark.parametrize("epsilon", ["fixed", "rms"])
def test_the_scale_of_the_loss_has_no_effect(epsilon: Any) -> None:
    """For eps to 0. The decay is as well of entries with a gradient only, which a scaled loss decays more."""
    found = []
    for factor in (1.0, 1000.0):
        parameters = start()
        optimizer = FAdam(parameters, eps=1e-30, epsilon=epsilon, weight_decay=0)
        train(optimizer, parameters, range(STEPS), factor)
        found.append(parameters)
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_training_has_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    whole, first = start(dtype), start(dtype)
    train(FAdam(whole, lr=0.1), whole, range(STEPS))
    stopped = FAdam(first, lr=0.1)
    train(stopped, first, range(8))
    torch.save([stopped.state_dict(), [p.detach() for p in first]], tmp_path / "checkpoint")
    state, values = torch.load(tmp_path / "checkpoint", weights_only=True)
    second = [nn.Parameter(value) for value in values]
    resumed = FAdam(second, lr=3.0)
    resumed.load_state_dict(state)
    train(resumed, second, range(8, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    assert {resumed.state[p]["fisher"].dtype for p in second} == {torch.float32}


def test_together_or_one_by_one_the_bits_are_the_same() -> None:
    found = []
    for foreach in (True, False):
        parameters = start(torch.float32)
        train(FAdam(parameters, foreach=foreach), parameters, range(STEPS))
        found.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_half_precision_is_rounded_once_a_step() -> None:
    halves, floats = start(torch.bfloat16), start(torch.bfloat16)
    floats = [nn.Parameter(p.detach().float()) for p in floats]
    optimizer, exact = FAdam(halves, lr=0.1), FAdam(floats, lr=0.1)
    for step in range(3):
        for parameter, other, gradient in zip(halves, floats, gradients(step, torch.bfloat16), strict=True):
            parameter.grad, other.grad = gradient, gradient.float()
            other.data.copy_(parameter.detach().float())
        optimizer.step()
        exact.step()
        assert all(torch.equal(p, q.to(torch.bfloat16)) for p, q in zip(halves, floats, strict=True))


def test_layouts_that_are_not_contiguous() -> None:
    value = torch.randn(600, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, turned = nn.Parameter(value.clone()), nn.Parameter(value.T.contiguous().T)
    for parameter in (plain, turned):
        optimizer = FAdam([parameter], lr=0.1)
        for step in range(3):
            parameter.grad = torch.sin(value + step)
            optimizer.step()
    torch.testing.assert_close(turned.detach(), plain.detach(), rtol=1e-12, atol=1e-12)


def test_groups_closures_schedules_and_parameters_without_a_gradient() -> None:
    model = nn.Linear(3, 2).double()
    unused = nn.Parameter(torch.ones(2))
    groups: list[dict[str, Any]] = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias, unused]}]
    optimizer = FAdam(groups, lr=0.25, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(torch.ones(4, 3, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss.detach()

    losses = [float(optimizer.step(closure)) for _ in range(3)]  # type: ignore[arg-type]
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.125]
    assert losses[0] > losses[2]
    assert torch.equal(unused, torch.ones(2))
    assert unused not in optimizer.state
    assert copy.deepcopy(optimizer).state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


def test_the_initial_fisher_is_divided_by_the_batch_size(tmp_path: Path) -> None:
    """f begins at the expected square of a batch mean, and counts as so many steps."""
    generator = torch.Generator().manual_seed(0)
    batch, n = 16, 4000
    rows_NP = torch.randn(n * batch, 3, generator=generator, dtype=torch.float64) * torch.tensor([0.1, 1.0, 10.0])
    per_example_P = rows_NP.square().mean(0)
    of_batches_P = rows_NP.reshape(n, batch, 3).mean(1).square().mean(0)
    save_file({"w": per_example_P}, tmp_path / "diagonal_fisher.safetensors")
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = FAdam(
        [("w", parameter), ("head", nn.Parameter(torch.zeros(2)))],
        initial_fisher=tmp_path / "diagonal_fisher.safetensors",
        initial_steps=50,
        batch_size=batch,
    )
    f = optimizer.state[parameter]["fisher"]
    torch.testing.assert_close(f, of_batches_P, rtol=0.1, atol=0)
    torch.testing.assert_close(f, per_example_P / batch, rtol=1e-15, atol=0)
    before, gradient = f.clone(), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    parameter.grad = gradient
    optimizer.step()
    beta2 = 0.999 * (1 - 0.999**50) / (1 - 0.999**51)
    expected = beta2 * before + (1 - beta2) * gradient.square()
    torch.testing.assert_close(optimizer.state[parameter]["fisher"], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: FAdam([p], lr=-1), "lr must be a number that is not negative, not -1"),
        (lambda p: FAdam([p], eps=0), "eps must be a number above 0, not 0"),
        (lambda p: FAdam([p], eps=1e-30, power=1.0), "eps to the power 2 · power is 0 in float32"),
        (lambda p: FAdam([p], clip=math.nan), "clip must be a number above 0"),
        (lambda p: FAdam([p], betas=(0.9, 1.0)), "betas must be two numbers from 0 to below 1"),
        (lambda p: FAdam([p], epsilon="mean"), "epsilon must be 'fixed' or 'rms'"),  # type: ignore[arg-type]
        (lambda p: FAdam([{"params": [p], "power": -1}]), "power must be a number above 0"),
        (lambda p: FAdam([nn.Parameter(p.detach().to(torch.complex64))]), "does not support complex parameters"),
        (lambda p: FAdam([("w", p)], initial_fisher={"w": p.detach()}), "initial_fisher needs batch_size"),
        (lambda p: FAdam([p], initial_fisher={"w": p}, batch_size=8), "give model.named_parameters"),
        (
            lambda p: FAdam([("w", p)], initial_fisher={"w": -torch.ones(3)}, batch_size=8),
            "initial_fisher: 'w' has entries that are negative or not finite",
        ),
        (
            lambda p: FAdam([("w", p)], initial_fisher={"v": torch.ones(3)}, batch_size=8),
            "initial_fisher: 'v' is no parameter of the optimizer",
        ),
        (
            lambda p: FAdam([("w", p)], initial_fisher={"w": torch.ones(2)}, batch_size=8),
            r"'w' has the shape \(2,\), and the parameter has \(3,\)",
        ),
        (
            lambda p: FAdam([("w", p)], initial_fisher="nowhere.safetensors", batch_size=8),
            "initial_fisher: nowhere.safetensors does not exist",
        ),
        (
            lambda p: FAdam([("w", p)], initial_fisher={}, initial_steps=0, batch_size=8),
            "initial_steps must be a whole number of at least 1",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make: Callable[[nn.Parameter], FAdam], message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        make(nn.Parameter(torch.zeros(3)))
    assert "\n" not in str(caught.value)


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    dense, sparse = nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True)
    dense(sparse(torch.tensor([1]))).sum().backward()
    optimizer = FAdam([*dense.parameters(), *sparse.parameters()])
    before = dense.weight.detach().clone()
    with pytest.raises(TrainingError, match="set sparse=False"):
        optimizer.step()
    assert torch.equal(dense.weight, before)
    assert not optimizer.state
