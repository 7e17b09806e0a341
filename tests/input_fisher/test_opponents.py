"""Every published attribution equals its definition, in float64, one example, draw and position at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from input_fisher import small_inputs
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.opponents import OPPONENTS, Explained, integrated_gradients
from npeff.input_fisher.predictions import FaithfulnessError, probabilities
from torch import Tensor
from torch.autograd.functional import jacobian

ROWS = [3, 11, 7, 0]


def explained(inputs: FlatInputs, examples: list[int], **options: int) -> Explained:
    makes = small_inputs.texts if inputs.exchangeable else small_inputs.tables
    noise = small_inputs.noise(makes(list(range(12 if inputs.exchangeable else 40))))
    classes_B = probabilities(inputs, inputs.values_BPF).argmax(1)
    return Explained(examples, classes_B, noise, **{"samples": 3, "steps": 8} | options)


def p(inputs: FlatInputs, row: int, class_: int, values_PF: Tensor) -> Tensor:
    values_BPF = inputs.values_BPF.clone()
    values_BPF[row] = values_PF
    return inputs.logits(values_BPF)[row].softmax(0)[class_]


def defined(name: str, inputs: FlatInputs, of: Explained) -> Tensor:
    found_BP = torch.zeros(inputs.used_BP.shape, dtype=torch.float64)
    for row, class_ in enumerate(of.classes_B.tolist()):
        x_PF = inputs.values_BPF[row]

        def gradient(values_PF: Tensor, row: int = row, class_: int = class_) -> Tensor:
            return jacobian(lambda v: p(inputs, row, class_, v), values_PF)

        noisy = [x_PF + of.noise.draw(inputs, of.examples, draw)[row] for draw in range(of.samples)]
        mean_PF = of.noise.mean_PF.expand(x_PF.shape)
        for position in torch.nonzero(inputs.used_BP[row])[:, 0].tolist():
            match name:
                case "gradient":
                    value = gradient(x_PF)[position].norm()
                case "gradient_times_input":
                    value = gradient(x_PF)[position] @ x_PF[position]
                case "smooth_grad":
                    value = torch.stack([gradient(z)[position] for z in noisy]).mean(0).sum()
                case "smooth_grad_times_input":
                    value = torch.stack([gradient(z)[position] for z in noisy]).mean(0) @ x_PF[position]
                case "smooth_grad_squared":
                    value = torch.stack([gradient(z)[position] ** 2 for z in noisy]).mean(0).sum()
                case "var_grad":
                    value = torch.stack([gradient(z)[position] for z in noisy]).var(0, correction=0).sum()
                case "occlusion":
                    without_PF = x_PF.clone()
                    without_PF[position] = mean_PF[position]
                    value = p(inputs, row, class_, x_PF) - p(inputs, row, class_, without_PF)
            found_BP[row, position] = value
    return found_BP


NAMES = sorted(set(OPPONENTS) - {"random", "integrated_gradients_zero", "integrated_gradients_mean"})


@pytest.mark.parametrize("makes", [small_inputs.tables, small_inputs.texts])
@pytest.mark.parametrize("name", NAMES)
def test_an_attribution_equals_its_definition(name, makes):
    inputs = makes(ROWS)
    of = explained(inputs, ROWS)
    found_BP = OPPONENTS[name].attribution(inputs, of)
    torch.testing.assert_close(found_BP, defined(name, inputs, of), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_integrated_gradients_are_the_integral_and_sum_to_the_change_of_the_probability(baseline):
    inputs = small_inputs.texts(ROWS)
    of = explained(inputs, ROWS, steps=64)
    found_BP = OPPONENTS[f"integrated_gradients_{baseline}"].attribution(inputs, of)
    start_PF = torch.zeros(()) if baseline == "zero" else of.noise.mean_PF
    start_BPF = torch.where(inputs.used_BP[..., None], start_PF, inputs.values_BPF)
    ends = [probabilities(inputs, values)[range(len(ROWS)), of.classes_B] for values in (start_BPF, inputs.values_BPF)]
    torch.testing.assert_close(found_BP.sum(1), ends[1] - ends[0], rtol=1e-7, atol=1e-9)
    row, class_ = 1, int(of.classes_B[1])
    change_PF = inputs.values_BPF[row] - start_BPF[row]
    points = [start_BPF[row] + (step + 0.5) / 100 * change_PF for step in range(100)]
    gradients = [jacobian(lambda v: p(inputs, row, class_, v), point_PF) for point_PF in points]
    torch.testing.assert_close(found_BP[row], (torch.stack(gradients).mean(0) * change_PF).sum(1), rtol=1e-3, atol=1e-4)


def test_integrated_gradients_take_a_baseline_of_one_example():
    inputs = small_inputs.tables(ROWS)
    of = explained(inputs, ROWS)
    zero_BP = integrated_gradients(inputs, of, inputs.values_BPF)
    assert torch.equal(zero_BP, torch.zeros_like(zero_BP))


@pytest.mark.parametrize("name", OPPONENTS)
def test_batches_order_and_padding_change_nothing(name):
    attribution = OPPONENTS[name].attribution
    inputs = small_inputs.texts(ROWS)
    found_BP = attribution(inputs, explained(inputs, ROWS))
    assert found_BP.dtype == torch.float64
    assert not found_BP[~inputs.used_BP].any()
    other_rows = [ROWS[place] for place in (2, 0)]
    others = small_inputs.texts(other_rows, padded_to=9)
    other_BP = attribution(others, explained(others, other_rows))
    torch.testing.assert_close(other_BP[:, :6], found_BP[[2, 0]], rtol=1e-9, atol=1e-13)
    assert not other_BP[:, 6:].any()


def test_random_attributions_follow_their_seed():
    inputs = small_inputs.tables(ROWS)
    first, second = (OPPONENTS["random"].attribution(inputs, explained(inputs, ROWS, seed=seed)) for seed in (0, 1))
    assert not torch.equal(first, second)
    assert len(np.unique(first)) == first.numel()


def test_the_passes_are_those_that_a_method_makes():
    rows = [4, 9]  # five positions each
    inputs = small_inputs.texts(rows)
    counts = {"forward": 0, "backward": 0}

    def logits(values_BPF: Tensor) -> Tensor:
        counts["forward"] += 1
        if values_BPF.requires_grad:
            values_BPF.register_hook(lambda _: counts.__setitem__("backward", counts["backward"] + 1))
        return inputs.logits(values_BPF)

    counted = FlatInputs(inputs.values_BPF, logits, inputs.used_BP, exchangeable=True)
    of = explained(inputs, rows)
    for opponent in OPPONENTS.values():
        counts.update(forward=0, backward=0)
        opponent.attribution(counted, of)
        assert opponent.passes(of, 5)._asdict() == counts


def test_several_predictions_are_refused():
    inputs = FlatInputs.of(torch.ones(2, 3), lambda values: torch.zeros(2, 4, 5) + values.sum())
    with pytest.raises(FaithfulnessError, match="one prediction per example, and these have 4"):
        probabilities(inputs, inputs.values_BPF)
    one = FlatInputs.of(torch.ones(2, 3), lambda values: torch.zeros(2, 1, 5))
    assert probabilities(one, one.values_BPF).shape == (2, 5)
