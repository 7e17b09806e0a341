"""Functional Fisher information and functional entropy, against closed forms and dense definitions in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from npeff.gradients import LabelSpec, UnsupportedModelError
from npeff.input_fisher.attribution import functional_entropy, input_information
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import Moments
from npeff.input_fisher.noise import InputNoise, factor_covariance

EXACT = LabelSpec("exact")


def problem(n=4, positions=3, features=2, classes=4, spread=0.5, kind="full"):
    """Inputs of a softmax-linear model, its weights (C, D), and noise with a random covariance."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(classes, positions * features, generator=generator, dtype=torch.float64)
    data = torch.randn(50, positions, features, generator=generator, dtype=torch.float64)
    data[:, 1] += data[:, 0]
    used = torch.ones(n, positions, dtype=torch.bool)
    inputs = FlatInputs(data[:n], lambda values: values.flatten(1) @ weights.T, used)
    moments = Moments.of(FlatInputs(data, inputs.logits, used), kind)
    return inputs, weights, InputNoise(moments.mean_PF, factor_covariance(moments, kind, 0.0), spread)


def covariance_of(noise):
    return noise.spread * noise.factors["joint"] @ noise.factors["joint"].T


def test_the_information_is_that_of_the_dense_definition():
    inputs, weights, noise = problem()
    covariance, examples, samples = covariance_of(noise), [2, 3, 5, 7], 6
    classes = torch.tensor([0, 1, 2, 3])
    found = input_information(inputs, noise, examples, samples=samples, classes_B=classes)
    expected = torch.zeros(samples, 4, 6, dtype=torch.float64)
    for draw in range(samples):
        z = (inputs.values_BPF + noise.draw(inputs, examples, draw)).flatten(1)
        for row in range(4):
            p = (weights @ z[row]).softmax(0)
            gradient = p[classes[row]] * (weights[classes[row]] - p @ weights)
            expected[draw, row] = (covariance @ gradient) * gradient / p[classes[row]] / 2
    torch.testing.assert_close(found.positions_BP, expected.mean(0).view(4, 3, 2).sum(2), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.information_B, expected.sum(2).mean(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(found.information_se_B, expected.sum(2).std(0) / samples**0.5, rtol=1e-10, atol=0)


def test_the_information_about_all_classes_is_the_sum_over_the_classes_and_the_input_fisher():
    inputs, weights, noise = problem()
    all_classes = input_information(inputs, noise, range(4), samples=5, labels=EXACT)
    each = [
        input_information(inputs, noise, range(4), samples=5, classes_B=torch.full((4,), label)) for label in range(4)
    ]
    for field in ("information_B", "positions_BP", "entropy_B"):
        total = sum(getattr(one, field) for one in each)
        torch.testing.assert_close(getattr(all_classes, field), total, rtol=1e-10, atol=1e-12)
    z = (inputs.values_BPF + noise.draw(inputs, range(4), 0)).flatten(1)
    one_draw = input_information(inputs, noise, range(4), samples=1, labels=EXACT)
    for row in range(4):
        p = (weights @ z[row]).softmax(0)
        fisher = weights.T @ (torch.diag(p) - torch.outer(p, p)) @ weights  # closed form of a softmax-linear model
        torch.testing.assert_close(one_draw.information_B[row], (covariance_of(noise) @ fisher).trace() / 2)
    assert one_draw.entropy_B.isnan().all()
    assert one_draw.information_se_B.isnan().all()


def test_sampled_labels_estimate_the_information_about_all_classes():
    inputs, _, noise = problem()
    exact = input_information(inputs, noise, range(4), samples=150, labels=EXACT)
    drawn = input_information(inputs, noise, range(4), samples=150, labels=LabelSpec("sampled", rank=4))
    error = (drawn.information_B - exact.information_B).abs()
    assert (error < 4 * (drawn.information_se_B**2 + exact.information_se_B**2).sqrt()).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_information_bounds_the_entropy_and_equals_it_for_small_noise(scale):
    inputs, weights, noise = problem(spread=1.0)
    inputs = FlatInputs(inputs.values_BPF, lambda v: scale * v.flatten(1) @ weights.T, inputs.used_BP)
    for classes in (None, torch.zeros(4, dtype=torch.long)):
        found = input_information(inputs, noise, range(4), samples=300, classes_B=classes, labels=EXACT)
        slack = 3 * (found.entropy_se_B**2 + found.information_se_B**2).sqrt()
        assert (found.entropy_B <= found.information_B + slack).all()
    small = InputNoise(noise.mean_PF, noise.factors, spread=1e-4)
    found = input_information(inputs, small, range(4), samples=600, labels=EXACT)
    slack = 4 * (found.entropy_se_B**2 + found.information_se_B**2).sqrt()
    assert ((found.entropy_B - found.information_B).abs() < slack + 0.01 * found.information_B).all()
    assert (found.stable_B >= 0.5).all()


def test_functional_entropies_in_closed_form():
    rng = np.random.default_rng(0)
    n, deviation = 400_000, 0.8
    x = deviation * rng.standard_normal(n)
    f = torch.from_numpy(np.exp(x))[:, None, None]  # Ent = ½ v exp(v / 2), which is ½ FI as well
    entropy, se = functional_entropy(f)
    assert abs(float(entropy) - 0.32 * np.exp(0.32)) < 4 * float(se)
    v = 5.098
    f = torch.from_numpy(v * rng.standard_normal(n) ** 2)[:, None, None]
    entropy, se = functional_entropy(f)
    assert abs(float(entropy) - v * (2 - np.euler_gamma - np.log(2))) < 4 * float(se)
    assert float(entropy) < 2 * v


def test_the_conditional_split_is_not_negative_and_keeps_the_information():
    inputs, _, noise = problem()
    total = input_information(inputs, noise, range(4), samples=3, labels=EXACT)
    split = input_information(inputs, noise, range(4), samples=3, labels=EXACT, conditional=True)
    torch.testing.assert_close(split.information_B, total.information_B)
    assert (split.positions_BP >= 0).all()
    torch.testing.assert_close(total.positions_BP.sum(1), total.information_B, rtol=1e-12, atol=0)


def test_the_result_depends_on_neither_batch_nor_padding():
    inputs, weights, _ = problem()
    weight = weights[:, :2]
    used = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, True, True]])

    def logits(values):  # sums over positions, which padding must not enter
        return (values * torch.nn.functional.pad(used, (0, values.shape[1] - 3))[: len(values), :, None]).sum(
            1
        ) @ weight.T

    text = FlatInputs(inputs.values_BPF, logits, used, exchangeable=True)
    moments = Moments.of(text, "full")
    noise = InputNoise(moments.mean_PF, factor_covariance(moments, "full", 1e-4), 0.5)
    whole = input_information(text, noise, [4, 1, 8, 2], samples=3, labels=EXACT)
    assert not whole.positions_BP[~used].any()
    padded = FlatInputs(
        torch.nn.functional.pad(text.values_BPF[:1], (0, 0, 0, 4)),
        logits,
        torch.nn.functional.pad(used[:1], (0, 4)),
        exchangeable=True,
    )
    alone = input_information(padded, noise, [4], samples=3, labels=EXACT)
    torch.testing.assert_close(alone.positions_BP[0, :3], whole.positions_BP[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(alone.entropy_B[0], whole.entropy_B[0], rtol=1e-9, atol=0)


def test_examples_that_are_not_finite_are_marked_and_change_no_other():
    inputs, _, noise = problem()
    clean = input_information(inputs, noise, range(4), samples=3, labels=EXACT)
    values = inputs.values_BPF.clone()
    values[1, 0, 0] = torch.nan
    found = input_information(
        FlatInputs(values, inputs.logits, inputs.used_BP), noise, range(4), samples=3, labels=EXACT
    )
    assert found.information_B[1].isnan()
    assert found.positions_BP[1].isnan().all()
    others = [0, 2, 3]
    torch.testing.assert_close(found.positions_BP[others], clean.positions_BP[others])


@pytest.mark.parametrize(
    "logits", [lambda v: v.detach().flatten(1), lambda v: torch.ones(4, 3, requires_grad=True) * 2]
)
def test_logits_without_gradients_are_refused(logits):
    inputs, _, noise = problem()
    with pytest.raises(UnsupportedModelError, match="no differentiable function of the inputs"):
        input_information(
            FlatInputs(inputs.values_BPF, logits, inputs.used_BP), noise, range(4), samples=1, labels=EXACT
        )


def test_several_predictions_have_one_information_and_no_entropy():
    inputs, weights, noise = problem()
    sequence = FlatInputs(
        inputs.values_BPF, lambda v: (v.flatten(1) @ weights.T)[:, None].expand(-1, 2, -1), inputs.used_BP
    )
    targets = torch.tensor([[1, -100]] * 4)
    found = input_information(
        sequence, noise, range(4), samples=100, labels=LabelSpec("sampled", rank=8), targets=targets
    )
    one = input_information(inputs, noise, range(4), samples=100, labels=EXACT)
    slack = 4 * (found.information_se_B**2 + one.information_se_B**2).sqrt()
    assert ((found.information_B - one.information_B).abs() < slack).all()
    assert found.entropy_B.isnan().all()


@pytest.mark.parametrize("labels", [EXACT, LabelSpec("sampled", rank=3), None])
def test_several_draws_of_a_pass_are_those_of_several_passes(labels):
    inputs, _, noise = problem()
    classes = None if labels else torch.tensor([0, 1, 2, 3])
    options = {"samples": 6, "labels": labels, "classes_B": classes, "conditional": True}
    one = input_information(inputs, noise, [5, 4, 2, 9], **options)
    repeated = FlatInputs(inputs.values_BPF.repeat(3, 1, 1), inputs.logits, inputs.used_BP.repeat(3, 1))
    before = inputs.logits(inputs.values_BPF).argmax(1)
    three = input_information(repeated, noise, [5, 4, 2, 9], repeats=3, before=before, **options)
    for field in dataclasses.fields(one):
        mine, theirs = getattr(three, field.name), getattr(one, field.name)
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
