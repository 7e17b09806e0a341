"""The scores of attributions equal their definition, one example, step and draw at a time."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from input_fisher import small_inputs
from npeff.input_fisher.faithfulness import FaithfulnessTest, Score, faithfulness
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.predictions import FaithfulnessError, probabilities
from npeff.input_fisher.replacements import GivenTheRest, MeanInput, OtherExamples, Replacement
from torch import Tensor

ROWS = [3, 11, 7, 0]
TEST = FaithfulnessTest(steps=3, fractions=(0.2, 0.5, 0.9), draws=4, curve_draws=2)


def everything(makes) -> FlatInputs:
    return makes(list(range(12 if makes is small_inputs.texts else 40)))


def replacements(makes, kind="full") -> dict[str, Replacement]:
    inputs = everything(makes)
    noise = small_inputs.noise(inputs, kind)
    pool = OtherExamples.of([(inputs, range(len(inputs.values_BPF)))])
    return {"mean": MeanInput(noise.mean_PF), "resample": pool, "conditional": GivenTheRest(noise)}


def attributions(rows: list[int], n_positions: int) -> dict[str, Tensor]:
    """Signed attributions without ties; unused positions have any value."""
    numbers = [torch.randn(20, generator=torch.Generator().manual_seed(row), dtype=torch.float64) for row in rows]
    values_BP = torch.stack(numbers)[:, :n_positions]
    return {"signed": values_BP, "size": values_BP.abs()}


def scores(inputs, rows, found_by, **options):
    classes_B = probabilities(inputs, inputs.values_BPF).argmax(1)
    values = attributions(rows, inputs.values_BPF.shape[1])
    return faithfulness(inputs, rows, classes_B, values, found_by, options.get("test", TEST))


def test_curves_and_information_equal_their_definitions():
    for makes in (small_inputs.tables, small_inputs.texts):
        inputs, found_by = makes(ROWS), replacements(makes)
        found = scores(inputs, ROWS, found_by)
        assert len(found) == 2 * (2 + 3 + 1)
        for (method, name, metric), values_B in found.items():
            expected_B = [_defined(inputs, row, method, found_by[name], metric) for row in range(len(ROWS))]
            torch.testing.assert_close(values_B, torch.tensor(expected_B, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def _defined(inputs: FlatInputs, row: int, method: str, by: Replacement, metric: str) -> float:
    values_P = attributions(ROWS, inputs.values_BPF.shape[1])[method][row]
    used = torch.nonzero(inputs.used_BP[row])[:, 0].tolist()
    size = values_P.abs() if metric == "information" else values_P
    order = sorted(used, key=lambda position: -float(size[position]))
    class_ = int(probabilities(inputs, inputs.values_BPF)[row].argmax())

    def replaced(positions: list[int], count: int) -> list[Tensor]:
        mask_BP = torch.zeros_like(inputs.used_BP)
        mask_BP[row, positions] = True
        draws = by.draws(inputs, ROWS, count)
        return [probabilities(inputs, each)[row] for each in by.values(inputs, draws, mask_BP)]

    if metric == "information":
        total = 0.0
        for fraction in TEST.fractions:
            drawn = replaced(order[: max(1, math.floor(fraction * len(used) + 0.5))], TEST.draws)
            mean = sum(drawn) / len(drawn)
            entropies = [-sum(float(q) * math.log(q) for q in p) for p in drawn]
            of_mean = -sum(float(q) * math.log(q) for q in mean)
            correction = sum(
                sum((float(p[c]) - float(mean[c])) ** 2 for p in drawn) / (len(drawn) - 1) / float(mean[c])
                for c in range(len(mean))
            ) / (2 * len(drawn))
            total += of_mean - sum(entropies) / len(drawn) + correction
        return total / len(TEST.fractions)
    steps = min(TEST.steps, len(used))
    counts = [math.floor(step * len(used) / steps + 0.5) for step in range(steps + 1)]
    heights = []
    for count in counts:
        positions = order[:count] if metric == "deletion" else order[count:]
        drawn = replaced(positions, TEST.curve_draws)
        heights.append(sum(float(p[class_]) for p in drawn) / len(drawn))
    widths = [(after - before) / len(used) for before, after in pairwise(counts)]
    return sum(width * (a + b) / 2 for width, (a, b) in zip(widths, pairwise(heights), strict=True))


@pytest.mark.parametrize("makes", [small_inputs.tables, small_inputs.texts])
def test_batches_and_order_change_nothing(makes):
    found_by = replacements(makes)
    found = scores(makes(ROWS), ROWS, found_by)
    others = [ROWS[place] for place in (2, 0)]
    for key, values_B in scores(makes(others), others, found_by).items():
        torch.testing.assert_close(values_B, found[key][[2, 0]], rtol=1e-9, atol=1e-12)


def test_padding_changes_nothing():
    found_by = replacements(small_inputs.texts)
    found = scores(small_inputs.texts(ROWS), ROWS, found_by)
    for key, values_B in scores(small_inputs.texts(ROWS, padded_to=9), ROWS, found_by).items():
        torch.testing.assert_close(values_B, found[key], rtol=1e-9, atol=1e-12)


# --- Replacements -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "kronecker", "diagonal"])
def test_draws_given_the_rest_have_the_conditional_mean_and_covariance(kind):
    inputs = small_inputs.tables(ROWS)
    noise = small_inputs.noise(everything(small_inputs.tables), kind, spread=1.0)
    size = inputs.values_BPF[0].numel()
    columns = noise.times(torch.eye(size, dtype=torch.float64).view(size, -1, 2), torch.ones(size, 5, dtype=torch.bool))
    covariance_DD = columns.flatten(1)
    replaced_BP = torch.zeros_like(inputs.used_BP)
    replaced_BP[0, [1, 4]] = True
    used_BP = inputs.used_BP.clone()
    used_BP[0, 2] = False  # neither conditioned on nor changed
    inputs = FlatInputs(inputs.values_BPF, inputs.logits, used_BP)
    new, kept = [2, 3, 8, 9], [0, 1, 6, 7]
    gain = covariance_DD[new][:, kept] @ torch.linalg.inv(covariance_DD[kept][:, kept])
    mean_D, x_D = noise.mean_PF.flatten(), inputs.values_BPF[0].flatten()
    by = GivenTheRest(noise)
    draws = by.draws(inputs, ROWS, 3)
    for draw_BPF, values_BPF in zip(draws, by.values(inputs, draws, replaced_BP), strict=True):
        z_D, found_D = draw_BPF[0].flatten(), values_BPF[0].flatten()
        torch.testing.assert_close(found_D[new] - z_D[new], gain @ (x_D[kept] - z_D[kept]), rtol=1e-8, atol=1e-9)
        assert torch.equal(found_D[[0, 1, 4, 5, 6, 7]], x_D[[0, 1, 4, 5, 6, 7]])
        assert torch.equal(values_BPF[1:], inputs.values_BPF[1:])
    # at the conditional mean of the draws, the new values are those of the best linear prediction
    at_mean = torch.where(used_BP[..., None], noise.mean_PF, 0).expand(1, *inputs.values_BPF.shape)
    (predicted_BPF,) = by.values(inputs, at_mean, replaced_BP)
    expected = mean_D[new] + gain @ (x_D[kept] - mean_D[kept])
    torch.testing.assert_close(predicted_BPF[0].flatten()[new], expected, rtol=1e-8, atol=1e-9)


def test_other_examples_give_whole_rows_and_never_the_example_itself():
    inputs = small_inputs.tables([0, 1, 2])
    pool = OtherExamples.of([(inputs, [0, 1, 2])], seed=5)
    draws = pool.draws(inputs, [0, 1, 2], 40)
    for row in range(3):
        donors = {
            next(other for other in range(3) if torch.equal(draw[row], inputs.values_BPF[other])) for draw in draws
        }
        assert donors == {0, 1, 2} - {row}
    with pytest.raises(FaithfulnessError, match="no other example"):
        OtherExamples.of([(small_inputs.tables([0]), [0])]).draws(small_inputs.tables([0]), [0], 1)


def test_texts_get_positions_of_other_texts():
    inputs = small_inputs.texts([4, 1])
    pool = OtherExamples.of([(inputs, [4, 1])])
    assert pool.pool_MPF.shape == (7, 1, 2)
    (draw,) = pool.draws(inputs, [4, 1], 1)
    tokens = {tuple(token) for token in inputs.values_BPF[1, :2].tolist()}
    assert {tuple(token) for token in draw[0, :5].tolist()} == tokens


def test_the_draws_that_test_an_attribution_are_not_those_that_made_it():
    inputs = small_inputs.tables(ROWS)
    noise = small_inputs.noise(everything(small_inputs.tables), spread=1.0)
    (draw,) = GivenTheRest(noise).draws(inputs, ROWS, 1)
    assert not torch.isclose(draw, noise.draw(inputs, ROWS, 0) + noise.mean_PF).any()


# --- Ties and failures ------------------------------------------------------------------------------------------------


def test_equal_attributions_are_ranked_at_random_and_reproducibly():
    rows = list(range(30))
    inputs = small_inputs.tables(rows)
    classes_B = probabilities(inputs, inputs.values_BPF).argmax(1)
    found_by = {"mean": replacements(small_inputs.tables)["mean"]}
    position_P = torch.arange(5.0, 0, -1).double()
    values = {"zero": torch.zeros(30, 5), "in order": position_P.expand(30, 5)}

    def deletion(seed: int) -> dict[str, Tensor]:
        found = faithfulness(inputs, rows, classes_B, values, found_by, FaithfulnessTest(steps=5, seed=seed))
        return {method: found[Score(method, "mean", "deletion")] for method in values}

    first, again, other = deletion(0), deletion(0), deletion(1)
    assert torch.equal(first["zero"], again["zero"])
    assert not torch.isclose(first["zero"], other["zero"]).all()
    assert torch.equal(first["in order"], other["in order"])
    assert float((first["zero"] == first["in order"]).double().mean()) < 0.2


def test_examples_without_finite_attributions_or_without_inputs_have_no_score():
    inputs = small_inputs.texts(ROWS)
    used_BP = inputs.used_BP.clone()
    used_BP[2] = False
    inputs = FlatInputs(inputs.values_BPF, inputs.logits, used_BP, exchangeable=True)
    values_BP = torch.ones(used_BP.shape)
    values_BP[0, 0], values_BP[1, 5] = torch.inf, torch.nan  # position 5 of the second text is padding
    found = faithfulness(
        inputs, ROWS, torch.zeros(4).long(), {"one": values_BP}, replacements(small_inputs.texts), TEST
    )
    for values_B in found.values():
        assert values_B.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"draws": 1}, "at least 2"), ({"steps": 0}, "at least 1"), ({"fractions": (0.0,)}, "above 0")],
)
def test_options_that_measure_nothing_are_refused(options, problem):
    with pytest.raises(FaithfulnessError, match=problem):
        FaithfulnessTest(**options)
