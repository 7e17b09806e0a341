"""Lengths of paths against closed forms, the dense definition, and the bracket of chord sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from npeff.input_fisher.path import Curve, FisherPath, Points, chord, fisher_path, straight
from npeff.input_fisher.velocity import Derivative, change_along
from torch import Tensor, nn

FINE = 1e-5


def smooth_network(n_in: int = 3, n_out: int = 4, scale: float = 2.0) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(n_in, 8), nn.Tanh(), nn.Linear(8, n_out)).double()
    with torch.no_grad():
        network[2].weight.mul_(scale * 2)
    return network


def ends(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return first, second


def dense_information(logits: Tensor, jacobian: Tensor, velocity: Tensor) -> float:
    """ẋᵀ JᵀSJ ẋ with the matrices of the definition, summed over predictions."""
    total = 0.0
    for z_C, j_CF in zip(logits.reshape(-1, logits.shape[-1]), jacobian, strict=True):
        p_C = z_C.softmax(-1)
        fisher_FF = j_CF.T @ (torch.diag(p_C) - torch.outer(p_C, p_C)) @ j_CF
        total += float((velocity @ fisher_FF @ velocity).detach())
    return total


def definition(network: nn.Module, first: Tensor, second: Tensor, n: int = 4000) -> tuple[float, float]:
    """The length by the midpoint rule and the chord sum, both with n equal steps."""
    s = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    middle = first + s[:, None] * (second - first)
    jacobians = torch.func.vmap(torch.func.jacrev(network))(middle)
    values = [
        dense_information(network(x)[None], jacobian[None], second - first)
        for x, jacobian in zip(middle, jacobians, strict=True)
    ]
    at = first + torch.linspace(0, 1, n + 1, dtype=torch.float64)[:, None] * (second - first)
    p = network(at).softmax(-1)
    cosines = (p[1:] * p[:-1]).sqrt().sum(-1).clamp(max=1)
    return float(np.sqrt(values).mean()), float(2 * torch.arccos(cosines).sum())


def assert_bracketed(path: FisherPath, tolerance: float) -> None:
    assert path.tolerance_met
    assert path.distance <= path.chord_sum * (1 + 1e-12)
    assert path.chord_sum <= path.length <= path.chord_sum * (1 + tolerance) * (1 + 1e-12)
    assert (np.diff(path.psi_n) >= 0).all()
    assert (path.psi_n[0], path.psi_n[-1]) == (0, pytest.approx(1, abs=1e-14))


@pytest.mark.parametrize("slope", [0.5, 6.0, 80.0])
def test_the_length_of_a_logistic_model_has_a_closed_form(slope: float) -> None:
    def logits(values: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(values), slope * (values - 0.4)], 1)

    path = fisher_path(Curve(straight(torch.zeros(1).double(), torch.ones(1).double()), logits), tolerance=FINE)
    first, last = (1 / (1 + math.exp(-slope * (s - 0.4))) for s in (0.0, 1.0))
    expected = 2 * abs(math.asin(math.sqrt(last)) - math.asin(math.sqrt(first)))
    assert path.length == pytest.approx(expected, rel=1e-5)
    assert path.distance == pytest.approx(expected, rel=1e-10)  # with two classes, a monotonic path is a shortest one
    assert path.efficiency == pytest.approx(1, abs=1e-5)
    p_n = 1 / (1 + np.exp(-slope * (path.s_n - 0.4)))
    psi_n = 2 * np.abs(np.arcsin(np.sqrt(p_n)) - np.arcsin(np.sqrt(first))) / expected
    np.testing.assert_allclose(path.psi_n, psi_n, atol=1e-5)
    assert_bracketed(path, FINE)


def test_the_information_and_the_length_are_those_of_the_definition() -> None:
    network, (first, second) = smooth_network(), ends(3)
    path = fisher_path(Curve(straight(first, second), network), tolerance=1e-6)
    length, chord_sum = definition(network, first, second)
    assert path.length == pytest.approx(length, rel=2e-6)
    assert path.chord_sum == pytest.approx(chord_sum, rel=2e-6)
    for s, fisher in zip(path.s_n[::20], path.fisher_n[::20], strict=True):
        x = first + s * (second - first)
        jacobian = torch.func.jacrev(network)(x)
        assert fisher == pytest.approx(dense_information(network(x)[None], jacobian[None], second - first), rel=1e-9)
    assert_bracketed(path, 1e-6)


def test_several_predictions_are_a_product_of_spheres() -> None:
    network, (first, second) = smooth_network(3, 12), ends(3)
    made = torch.tensor([True, False, True])

    def logits(values: Tensor) -> Tensor:
        return network(values).view(-1, 3, 4)

    path = fisher_path(Curve(straight(first, second), logits, made), tolerance=FINE)
    at = first + 0.5 * (second - first)
    jacobian = torch.func.jacrev(lambda x: logits(x[None])[0])(at)
    expected = dense_information(logits(at[None])[0, made], jacobian[made], second - first)
    assert path.fisher_n[path.s_n == 0.5] == pytest.approx(expected, rel=1e-9)
    p, q = (logits(each[None])[0, made].softmax(-1) for each in (first, second))
    each = 2 * torch.arccos((p * q).sqrt().sum(-1))
    assert path.distance == pytest.approx(float(each.square().sum().sqrt()), rel=1e-9)
    assert_bracketed(path, FINE)


@pytest.mark.parametrize("seed", range(5))
def test_paths_with_kinks_are_bracketed(seed: int) -> None:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 10))
    with torch.no_grad():
        network[2].weight.mul_(10)
    path = fisher_path(Curve(straight(*torch.randn(2, 5)), network))
    assert_bracketed(path, 0.01)


def along(warp: bool, first: Tensor, second: Tensor) -> Points:
    def points(s_n: np.ndarray) -> tuple[Tensor, Tensor]:
        s = torch.as_tensor(s_n)[:, None]
        t, slope = (s**2 * (2 - s), 4 * s - 3 * s**2) if warp else (s, torch.ones_like(s))
        bend = torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)
        return first + t * (second - first) + t**2 * bend, slope * (second - first + 2 * t * bend)

    return points


def test_another_parametrization_changes_neither_length_nor_scale() -> None:
    network, (first, second) = smooth_network(), ends(3)
    plain, warped = (
        fisher_path(Curve(along(warp, first, second), network), points=4, tolerance=2e-7) for warp in (False, True)
    )
    assert warped.length == pytest.approx(plain.length, rel=1e-6)
    t_n = warped.s_n**2 * (2 - warped.s_n)
    fine = fisher_path(Curve(along(False, first, second), network), points=4000, tolerance=1e-3)
    np.testing.assert_allclose(warped.psi_n, np.interp(t_n, fine.s_n, fine.psi_n), atol=1e-6)


def test_small_chords_are_accurate() -> None:
    z, step = torch.tensor([[0.3, -1.0, 2.0]], dtype=torch.float64), torch.tensor([[1e-9, 0.0, -1e-9]])
    p, v = z.softmax(-1), step.double()
    expected = float((p * v.square()).sum() - (p * v).sum().square()) ** 0.5
    assert float(chord(z, z + v)) == pytest.approx(expected, rel=1e-6)
    certain = torch.tensor([[0.0, -math.inf]]), torch.tensor([[-math.inf, 0.0]])
    assert float(chord(*certain)) == pytest.approx(math.pi)
    assert float(chord(certain[0], certain[0])) == 0


def test_a_path_without_change_has_no_scale() -> None:
    path = fisher_path(
        Curve(straight(torch.zeros(2), torch.ones(2)), lambda values: torch.zeros(len(values), 3) + 0 * values[:, :1])
    )
    assert (path.length, path.distance, path.efficiency, path.half_at) == (0, 0, None, None)
    assert path.tolerance_met
    assert np.isnan(path.psi_n).all()
    assert (path.fisher_n == 0).all()


def test_information_that_is_not_finite_is_told() -> None:
    path = fisher_path(Curve(straight(-torch.ones(2), torch.ones(2)), lambda values: values.sqrt()))
    assert math.isnan(path.length)
    assert not path.tolerance_met
    assert np.isnan(path.psi_n).all()


def test_at_the_largest_number_of_points_the_tolerance_is_not_met() -> None:
    network, (first, second) = smooth_network(scale=20), ends(3)
    path = fisher_path(Curve(straight(first, second), network), points=4, tolerance=1e-9, largest=50)
    assert not path.tolerance_met
    assert len(path.s_n) <= 50
    assert path.distance <= path.chord_sum <= path.length
    single = fisher_path(Curve(straight(first.float(), second.float()), network.float()), tolerance=1e-9)
    assert not single.tolerance_met
    assert len(single.s_n) < 4096


class _Square(torch.autograd.Function):
    """A function without forward mode."""

    @staticmethod
    def forward(ctx, values):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(values)
        return values**2

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * gradient


def test_without_forward_mode_two_backward_passes_compute_the_same() -> None:
    network, (first, second) = smooth_network(), ends(3)
    with_forward = Curve(straight(first, second), lambda values: network(values**2))
    without = Curve(straight(first, second), lambda values: network(_Square.apply(values)))
    expected, found = (fisher_path(curve) for curve in (with_forward, without))
    np.testing.assert_allclose(found.fisher_n, expected.fisher_n, rtol=1e-9)
    assert found.length == pytest.approx(expected.length, rel=1e-12)


def test_attention_and_encoder_layers_have_velocities() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).double().eval()
    first, second = ends(5, 8)
    x, v = first[None], (second - first)[None]
    value, velocity = Derivative(encoder)([x], [v])
    step = 1e-6
    with torch.no_grad():
        expected = (encoder(x + step * v) - encoder(x - step * v)) / (2 * step)
    torch.testing.assert_close(velocity, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(value, encoder(x).detach())


def test_an_error_of_the_model_is_the_error() -> None:
    def logits(values: Tensor) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fisher_path(Curve(straight(*ends(2)), logits))


def test_the_share_of_a_direction_is_that_of_the_definition() -> None:
    network, (first, second) = smooth_network(), ends(3)
    direction = {"2.weight": torch.randn(4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}
    path = fisher_path(
        Curve(straight(first, second), network, change=change_along(network, direction, network)), tolerance=FINE
    )
    n, total = 300, 0.0
    for s in (np.arange(n) + 0.5) / n:
        x = first + s * (second - first)
        p = network(x).softmax(-1).detach()
        factor = torch.linalg.cholesky(torch.diag(p) - torch.outer(p, p) + 1e-14 * torch.eye(4))
        v = factor.T @ torch.func.jacrev(network)(x) @ (second - first)
        u = factor.T @ direction["2.weight"] @ network[:2](x)
        total += float((v @ u).abs() / u.norm()) / n
    assert path.changed_length == pytest.approx(total, rel=1e-4)
    assert 0 < path.changed_length <= path.length
    assert network[2].weight.requires_grad


def test_the_speed_of_the_path_itself_has_the_share_one() -> None:
    network, (first, second) = smooth_network(), ends(3)
    points = straight(first, second)
    itself = Derivative(network)
    path = fisher_path(
        Curve(points, network, change=lambda values: itself([values], [(second - first).expand_as(values)])[1])
    )
    assert path.changed_length == pytest.approx(path.length, rel=1e-2)
    none = fisher_path(Curve(points, network, change=lambda values: torch.zeros(len(values), 4)))
    assert none.changed_length == 0
