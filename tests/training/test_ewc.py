"""The penalty is its sum, its minimum is that of the joint loss where both are quadratic, and misfits are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from npeff.gradients import model_fingerprint, select_parameters
from npeff.training import EWC, TrainingError
from safetensors.torch import save_file
from torch import Tensor, nn


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def task(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A Fisher, of all parameters but one, and parameters."""
    anchor = values_of(network(seed))
    return {name: value.square() * seed for name, value in anchor.items() if name != "2.bias"}, anchor


def by_definition(model: nn.Module, fishers: list[dict[str, Tensor]], anchors: list[dict[str, Tensor]]) -> float:
    """Entry by entry."""
    total, parameters = 0.0, values_of(model)
    for fisher, anchor in zip(fishers, anchors, strict=True):
        for name, values in fisher.items():
            rows = zip(values.flatten(), parameters[name].flatten(), anchor[name].flatten(), strict=True)
            total += sum(float(f) * (float(p) - float(a)) ** 2 for f, p, a in rows)
    return total


def test_the_penalty_is_half_the_weighted_sum_of_squares() -> None:
    model, tasks = network(), [task(seed) for seed in (1, 2, 3)]
    fishers, anchors = [fisher for fisher, _ in tasks], [anchor for _, anchor in tasks]
    found = EWC(fishers, anchors, weight=6.0).penalty(model)
    assert found.item() == pytest.approx(3.0 * by_definition(model, fishers, anchors), rel=1e-12)
    online = {name: 0.25 * fishers[0][name] + 0.5 * fishers[1][name] + fishers[2][name] for name in fishers[0]}
    found = EWC(fishers, anchors, weight=6.0, mode="online", decay=0.5).penalty(model)
    assert found.item() == pytest.approx(3.0 * by_definition(model, [online], anchors[2:]), rel=1e-12)


def test_online_without_decay_is_separate_for_one_anchor() -> None:
    model, tasks, anchor = network(), [task(seed) for seed in (1, 2)], task(3)[1]
    fishers = [fisher for fisher, _ in tasks]
    penalties = [EWC(fishers, [anchor] * 2, weight=1, mode=mode).penalty(model) for mode in ("separate", "online")]  # type: ignore[arg-type]
    torch.testing.assert_close(*penalties, rtol=1e-12, atol=0)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, (fisher, anchor), step = network(), task(1), 1e-5
    ewc = EWC([fisher], [anchor], weight=3.0)
    ewc.penalty(model).backward()
    for parameter in model.parameters():
        flat = parameter.detach().view(-1)
        for entry in range(len(flat)):
            before, sides = float(flat[entry]), []
            for sign in (1, -1):
                flat[entry] = before + sign * step
                sides.append(ewc.penalty(model).item())
            flat[entry] = before
            found = 0.0 if parameter.grad is None else parameter.grad.view(-1)[entry].item()
            assert found == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_the_minimum_of_a_linear_regression_is_the_joint_ridge_solution(mode: Any) -> None:
    """Two tasks and a prior. The Gram matrix of the first task is diagonal, so that its diagonal is all of it."""
    generator = torch.Generator().manual_seed(0)
    n, m, ridge = 40, 30, 0.7
    orthogonal = torch.linalg.qr(torch.randn(n, 5, generator=generator, dtype=torch.float64)).Q
    x_A = orthogonal * torch.tensor([0.5, 1.0, 2.0, 3.0, 4.0])
    x_B = torch.randn(m, 5, generator=generator, dtype=torch.float64)
    y_A, y_B = (torch.randn(k, generator=generator, dtype=torch.float64) for k in (n, m))
    eye = torch.eye(5, dtype=torch.float64)
    gram = x_A.T @ x_A
    if mode == "separate":  # the prior is a task of its own, at 0
        fishers = [{"weight": gram.diag()[None] / n}, {"weight": torch.full((1, 5), ridge / n, dtype=torch.float64)}]
        anchors = [torch.linalg.solve(gram, x_A.T @ y_A), torch.zeros(5, dtype=torch.float64)]
    else:  # the prior is in the Fisher of the ridge solution
        fishers = [{"weight": (gram.diag()[None] + ridge) / n}]
        anchors = [torch.linalg.solve(gram + ridge * eye, x_A.T @ y_A)]
    ewc = EWC(fishers, [{"weight": anchor[None]} for anchor in anchors], weight=n, mode=mode)
    model = nn.Linear(5, 1, bias=False).double()

    def loss() -> Tensor:
        return 0.5 * (model(x_B)[:, 0] - y_B).square().sum() + ewc.penalty(model)

    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)  # type: ignore[arg-type]
    joint = torch.linalg.solve(gram + x_B.T @ x_B + ridge * eye, x_A.T @ y_A + x_B.T @ y_B)
    torch.testing.assert_close(model.weight.detach()[0], joint, rtol=0, atol=1e-8)


def test_a_training_loop_stays_near_what_the_fisher_holds() -> None:
    """Two entries want to go to 1. The one with a Fisher stays where weight · F balances the loss."""
    model = nn.Linear(2, 1, bias=False).double()
    model.weight.data.zero_()
    ewc = EWC([{"weight": torch.tensor([[3.0, 0.0]])}], [{"weight": torch.zeros(1, 2)}], weight=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        loss = 0.5 * (model.weight - 1).square().sum() + ewc.penalty(model)
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.25, 1.0]], dtype=torch.float64))


def test_half_precision_is_penalized_in_float32() -> None:
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    anchor = {"weight": model.weight.detach() + 1}
    penalty = EWC([{"weight": torch.full((1, 2), 1e-30)}], [anchor], weight=1e30).penalty(model)
    assert penalty.dtype == torch.float32
    assert 0.9 < penalty.item() < 1.1


def files(folder: Path, model: nn.Module, labels: str = "exact") -> tuple[Path, Path]:
    """A Fisher with the header that a run writes, and parameters."""
    fisher = {name: torch.ones_like(value) for name, value in values_of(model).items()}
    metadata = {"labels": labels, "model_fingerprint": model_fingerprint(model, select_parameters(model))}
    save_file(fisher, folder / "fisher.safetensors", metadata)
    save_file(values_of(model), folder / "parameters.safetensors")
    return folder / "fisher.safetensors", folder / "parameters.safetensors"


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_files_of_another_model_are_refused(mode: Any, tmp_path: Path) -> None:
    model = network()
    fisher, parameters = files(tmp_path, model)
    assert EWC([fisher], [parameters], weight=1, mode=mode).penalty(model).item() == 0
    other = EWC([fisher], [values_of(network(1))], weight=1, mode=mode)
    for _ in range(2):
        with pytest.raises(TrainingError, match="task 0: the anchors are not the parameters at which its Fisher was"):
            other.penalty(model)


def test_empirical_fishers_are_refused_unless_they_are_wanted(tmp_path: Path) -> None:
    model = network()
    fisher, parameters = files(tmp_path, model, "empirical")
    with pytest.raises(TrainingError, match="or set allow_empirical=True"):
        EWC([fisher], [parameters], weight=1)
    assert EWC([fisher], [parameters], weight=1, allow_empirical=True).penalty(model).item() == 0


ONE = {"weight": torch.ones(1, 2)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EWC([ONE], [{"bias": torch.ones(2)}], weight=1), "anchors, task 0: there is no 'weight'"),
        (
            lambda: EWC([ONE], [{"weight": torch.ones(2)}], weight=1),
            r"task 0: 'weight' has the shape \(1, 2\), and the",
        ),
        (lambda: EWC([ONE, ONE], [ONE], weight=1), "as many anchors as fishers"),
        (lambda: EWC([], [], weight=1), "at least one"),
        (lambda: EWC([{}], [ONE], weight=1), "fishers, task 0 is empty"),
        (lambda: EWC(ONE, [ONE], weight=1), "must be lists with one item for each task"),  # type: ignore[arg-type]
        (lambda: EWC([{"weight": -ONE["weight"]}], [ONE], weight=1), "negative or not finite"),
        (
            lambda: EWC([ONE], [{"weight": ONE["weight"] / 0}], weight=1),
            "anchors, task 0: 'weight' has entries that are",
        ),
        (lambda: EWC([ONE], [ONE], weight=-1), "weight must be a number that is not negative"),
        (lambda: EWC([ONE], [ONE], weight=1, mode="both"), "mode must be 'separate' or 'online'"),  # type: ignore[arg-type]
        (lambda: EWC([ONE], [ONE], weight=1, decay=0.5), "decay applies to mode='online'"),
        (lambda: EWC([ONE], [ONE], weight=1, mode="online", decay=2), "decay must be a number from 0 to 1"),
        (lambda: EWC(["missing.safetensors"], [ONE], weight=1), "fishers, task 0: missing.safetensors does not exist"),
        (lambda: EWC([3], [ONE], weight=1), "must be a mapping of tensors or the path"),  # type: ignore[list-item]
        (
            lambda: EWC([{"w": torch.ones(1)}, ONE], [{"w": torch.ones(1)}, ONE], weight=1, mode="online"),
            "task 0: 'w' has no Fisher in the last task",
        ),
        (lambda: EWC([ONE], [ONE], weight=1).penalty(nn.Linear(3, 1)), r"'weight' has the shape \(1, 2\), and the"),
        (
            lambda: EWC([ONE], [ONE], weight=1).penalty(nn.Sequential(nn.Linear(2, 1))),
            r"task 0: the model has no parameter 'weight' \(it has 0.weight, 0.bias\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fisher.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="cannot be read as a safetensors file"):
        EWC([path], [ONE], weight=1)
