"""K-FAC: the factors are the mean products of inputs and of gradients, and the solution is the dense one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from npeff.gradients import GradientCollector, LabelSpec, UnsupportedModelError, exact_label_factor, select_parameters
from npeff.gradients.contribution import Dense
from npeff.training import KroneckerPreconditioner, KroneckerSums, TrainingError, kronecker_layers
from torch import Tensor, nn
from torch.nn import functional

N, DAMPING = 14, 0.05


class Mixed(nn.Module):
    """A convolution, a norm, and linear layers with and without a bias, at several positions and at one."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 3, (2, 3), stride=2, padding=1)
        self.norm = nn.LayerNorm(3)
        self.at_positions = nn.Linear(3, 4)
        self.no_bias = nn.Linear(4, 5, bias=False)
        self.out = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        found = torch.tanh(self.convolution(images)).flatten(2).mT
        found = torch.tanh(self.at_positions(self.norm(found))).mean(1)
        return self.out(torch.tanh(self.no_bias(found)))


def made(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.6)
    return model.double()


def images() -> Tensor:
    return torch.randn(N, 2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sums_of(model: nn.Module, inputs: Tensor, batch: int, **parameters: Any) -> KroneckerSums:
    layout = select_parameters(model, **parameters)
    collector = GradientCollector(model, lambda model, batch: model(batch), layout, LabelSpec())
    total: KroneckerSums | None = None
    for start in range(0, len(inputs), batch):
        sums = KroneckerSums.empty(kronecker_layers(model, layout), layout)
        part = inputs[start : start + batch]
        sums.add(collector.collect(part, range(start, start + len(part))), torch.ones(len(part), dtype=torch.bool))
        if total is None:
            total = sums
        else:
            total.merge(sums)
    assert total is not None
    return total


def captured(model: nn.Module, layer: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (n, T, i) and gradients (n, T, R, o) of a layer, one example and one direction at a time."""
    kept: list[tuple[Tensor, Tensor]] = []
    hook = layer.register_forward_hook(lambda module, given, out: kept.append((given[0], out)))
    found = [[], []]
    for image in inputs:
        kept.clear()
        logits = model(image[None])
        ((given, out),) = kept
        factor = exact_label_factor(logits.detach())[0]
        grads = [torch.autograd.grad(logits[0] @ column, out, retain_graph=True)[0] for column in factor.T]
        if isinstance(layer, nn.Conv2d):
            given = functional.unfold(given, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
            grads = [grad.flatten(2).mT for grad in grads]
        found[0].append(given.detach().reshape(-1, given.shape[-1]))
        found[1].append(torch.stack([grad.reshape(-1, grad.shape[-1]) for grad in grads], dim=1))
    hook.remove()
    return torch.stack(found[0]), torch.stack(found[1])


def defined(model: nn.Module, name: str, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """A and G of a layer."""
    layer = model.get_submodule(name)
    inputs_nTi, deltas_nTRo = captured(model, layer, inputs)
    if layer.bias is not None:
        inputs_nTi = torch.cat([inputs_nTi, torch.ones_like(inputs_nTi[..., :1])], dim=-1)
    return (
        torch.einsum("nti,ntj->ij", inputs_nTi, inputs_nTi) / inputs_nTi.shape[:2].numel(),
        torch.einsum("ntro,ntrp->op", deltas_nTRo, deltas_nTRo) / len(inputs),
    )


def solution(fisher: Tensor, matrix: Tensor) -> Tensor:
    damped = fisher + DAMPING * torch.eye(len(fisher), dtype=torch.float64)
    return torch.linalg.solve(damped, matrix.flatten()).reshape(matrix.shape)


LAYERS = ["convolution", "at_positions", "no_bias", "out"]


@pytest.mark.parametrize("batch", [N, 4])
def test_the_solution_is_the_dense_one_of_every_layer(batch: int) -> None:
    model, inputs = made(Mixed()), images()
    kind = KroneckerPreconditioner(sums_of(model, inputs, batch), damping=DAMPING)
    g = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    found = kind.precondition(g)
    assert list(found) == list(g)
    for name in LAYERS:
        inner, outer = defined(model, name, inputs)
        names = [key for key in (f"{name}.weight", f"{name}.bias") if key in g]
        matrix = torch.cat([g[key].reshape(len(outer), -1) for key in names], dim=1)
        expected = solution(torch.kron(outer, inner), matrix)
        solved = torch.cat([found[key].reshape(len(outer), -1) for key in names], dim=1)
        torch.testing.assert_close(solved, expected, rtol=1e-8, atol=1e-10)
    for name in ("norm.weight", "norm.bias"):
        diagonal = torch.zeros_like(g[name])
        for image in inputs:
            logits = model(image[None])
            for column in exact_label_factor(logits.detach())[0].T:
                (grad,) = torch.autograd.grad(logits[0] @ column, model.get_parameter(name), retain_graph=True)
                diagonal += grad.square() / N
        torch.testing.assert_close(found[name], g[name] / (diagonal + DAMPING), rtol=1e-8, atol=0)


def test_one_linear_layer_with_one_example_is_the_fisher_itself() -> None:
    model = made(nn.Linear(4, 3))
    inputs = torch.randn(1, 4, dtype=torch.float64)
    kind = KroneckerPreconditioner(sums_of(model, inputs, 1), damping=DAMPING)
    p = model(inputs)[0].detach().softmax(-1)
    a = torch.cat([inputs[0], torch.ones(1)])
    g = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    matrix = torch.cat([g["weight"], g["bias"][:, None]], dim=1)
    expected = solution(torch.kron(p.diag() - p.outer(p), a.outer(a)), matrix)
    found = kind.precondition(g)
    torch.testing.assert_close(torch.cat([found["weight"], found["bias"][:, None]], dim=1), expected, rtol=1e-8, atol=0)


class Padded(nn.Module):
    """The mean over positions that are not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, values: Tensor) -> Tensor:
        mask = (values != 0).any(-1, keepdim=True)
        return self.out((torch.tanh(self.inner(values)) * mask).sum(1) / mask.sum(1))


def test_padding_and_examples_that_are_left_out_change_nothing() -> None:
    model = made(Padded())
    values = torch.randn(6, 5, 3, dtype=torch.float64)
    expected = sums_of(model, values, 6)
    padded = sums_of(model, torch.cat([values, torch.zeros(6, 4, 3)], dim=1), 3)
    layout = select_parameters(model)
    collector = GradientCollector(model, lambda model, batch: model(batch), layout, LabelSpec())
    some = KroneckerSums.empty(kronecker_layers(model, layout), layout)
    more = torch.cat([values, torch.randn(2, 5, 3, dtype=torch.float64)])
    some.add(collector.collect(more), torch.arange(8) < 6)
    for other in (padded, some):
        assert other.positions == expected.positions
        assert other.n_examples == 6
        for name in expected.inputs:
            torch.testing.assert_close(other.inputs[name], expected.inputs[name], rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(other.outputs[name], expected.outputs[name], rtol=1e-12, atol=1e-14)


class Tied(nn.Module):
    """Two layers share a weight, and a third one is the `Conv1D` of the GPT-2 family."""

    def __init__(self) -> None:
        super().__init__()
        conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
        self.first, self.second, self.transposed = nn.Linear(3, 3), nn.Linear(3, 3), conv1d(4, 3)
        self.second.weight = self.first.weight

    def forward(self, values: Tensor) -> Tensor:
        return self.transposed(torch.tanh(self.second(torch.tanh(self.first(values)))))


def test_shared_parameters_have_their_diagonal_and_a_transposed_weight_is_a_layer() -> None:
    model = made(Tied())
    assert [layer.weight for layer in kronecker_layers(model, select_parameters(model))] == ["transposed.weight"]
    values = torch.randn(5, 3, dtype=torch.float64)
    kind = KroneckerPreconditioner(sums_of(model, values, 5), damping=DAMPING)
    g = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    found = kind.precondition(g)
    inner, outer = defined(model, "transposed", values)
    matrix = torch.cat([g["transposed.weight"].T, g["transposed.bias"][:, None]], dim=1)
    expected = solution(torch.kron(outer, inner), matrix)
    torch.testing.assert_close(found["transposed.weight"], expected[:, :-1].T, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found["transposed.bias"], expected[:, -1], rtol=1e-8, atol=1e-12)


def test_a_layer_whose_bias_is_left_out_has_no_one_among_its_inputs() -> None:
    model = made(nn.Sequential(nn.Linear(4, 3)))
    sums = sums_of(model, torch.randn(5, 4, dtype=torch.float64), 5, exclude=("0.bias",))
    assert sums.inputs["0.weight"].shape == (4, 4)
    assert list(KroneckerPreconditioner(sums, damping=1.0).precondition({"0.weight": torch.ones(3, 4)})) == ["0.weight"]


def test_bad_input_is_refused() -> None:
    model = made(nn.Linear(4, 3))
    sums = sums_of(model, torch.randn(5, 4, dtype=torch.float64), 5)
    for damping in (0, -1, math.nan):
        with pytest.raises(TrainingError, match="damping must be a finite number above 0"):
            KroneckerPreconditioner(sums, damping=damping)
    with pytest.raises(TrainingError, match="the gradient of 'bias' is missing"):
        KroneckerPreconditioner(sums, damping=1.0).precondition({"weight": torch.ones(3, 4)})
    layout = select_parameters(model)
    collector = GradientCollector(model, lambda model, batch: model(batch), layout, LabelSpec())
    collected = collector.collect(torch.randn(5, 4, dtype=torch.float64))
    dense = {name: Dense(part.dense()) for name, part in collected.contributions.items()}
    with pytest.raises(UnsupportedModelError, match="K-FAC does not apply: use another kind"):
        sums.add(replace(collected, contributions=dense), torch.ones(5, dtype=torch.bool))
