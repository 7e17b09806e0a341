"""The compiled transformer: its weights are its program, and each rule's weights are where it is said they are.

Shapes: N examples, T positions, R rank, P parameters.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import select_parameters
from npeff.models.loaded import ModelSpec
from npeff.sketches import SketchSpec, make_sketch
from npeff.tasks import TaskError, load_task
from npeff.tasks.planted.compiled import CompiledRulesTask
from npeff.tasks.planted.compiled_program import (
    _UNIT,
    ANIMALS,
    CLASSES,
    COLOURS,
    DEFAULT_PUSH,
    LENGTH,
    RULES,
    START,
    TURN,
    VOCABULARY,
    compile_rules,
    fired,
    output_logits,
    program_logits,
)
from torch import Tensor

REFERENCE: dict[str, Callable[[list[str], list[str]], bool]] = {
    "alarm_occurs": lambda first, second: "alarm" in first + second,
    "whistle_occurs": lambda first, second: "whistle" in first + second,
    "gate_opens_first": lambda first, second: first[0] == "gate",
    "gate_opens_second": lambda first, second: second[0] == "gate",
    "three_drums": lambda first, second: (first + second).count("drum") >= 3,
    "two_bells": lambda first, second: (first + second).count("bell") >= 2,
    "same_colour": lambda first, second: bool({*first} & {*second} & {*COLOURS}),
    "same_animal": lambda first, second: bool({*first} & {*second} & {*ANIMALS}),
}
"""What the rules say, in terms of the two segments and of nothing else."""


def any_sequences(n: int) -> list[tuple[list[str], list[str]]]:
    """Segments of words drawn from all, or from a few: words that are repeated often, rules that fire many at once."""
    source, drawn = random.Random(0), []
    for i in range(n):
        words = VOCABULARY[2:] if i % 2 else source.sample(VOCABULARY[2:], source.randint(1, 6))
        drawn.append((source.choices(words, k=7), source.choices(words, k=7)))
    return drawn


SEQUENCES = any_sequences(4000)


def tokens_of(sequences: list[list[str]]) -> Tensor:
    return torch.tensor([[VOCABULARY.index(word) for word in words] for words in sequences])


def logits_of(model: torch.nn.Module, tokens_NT: Tensor) -> Tensor:
    with torch.no_grad():
        logits_NC: Tensor = model(tokens_NT)
    return logits_NC


@pytest.fixture(scope="module")
def words_N() -> list[list[str]]:
    return [[START, *first, TURN, *second] for first, second in SEQUENCES]


@pytest.fixture(scope="module")
def tokens_NT(words_N: list[list[str]]) -> Tensor:
    return tokens_of(words_N)


@pytest.fixture(scope="module")
def before_NC(tokens_NT: Tensor) -> Tensor:
    """The logits of the unchanged model."""
    return logits_of(compile_rules(1.0)[0], tokens_NT)


def test_a_rule_fires_where_the_reference_says(words_N: list[list[str]]) -> None:
    assert list(REFERENCE) == [rule.name for rule in RULES]
    expected = [[rule(*segments) for rule in REFERENCE.values()] for segments in SEQUENCES]
    assert [fired(words) for words in words_N] == expected
    often = np.mean(expected, axis=0)
    assert ((often > 0.02) & (often < 0.6)).all(), "every rule is tried both ways"


def test_the_model_computes_the_program(words_N: list[list[str]], before_NC: Tensor) -> None:
    expected_NC = torch.tensor([program_logits(words) for words in words_N])
    torch.testing.assert_close(before_NC, expected_NC, atol=1e-5, rtol=1e-5)
    assert (before_NC.argmax(1) == expected_NC.argmax(1)).all()


def test_a_units_activation_is_its_rules_score_and_exactly_zero_where_it_does_not_fire(
    words_N: list[list[str]], tokens_NT: Tensor
) -> None:
    model, _ = compile_rules(1.0)
    read: list[Tensor] = []
    model.readout.register_forward_hook(lambda module, inputs, output: read.append(output))
    logits_of(model, tokens_NT)
    fires = torch.tensor([fired(words) for words in words_N])
    units_NR = read[0].relu()
    assert torch.equal(units_NR > 0, fires)
    scores_NR = torch.tensor([[max(rule.score(words), 0.0) for rule in RULES] for words in words_N])
    torch.testing.assert_close(units_NR / _UNIT, scores_NR, atol=1e-5, rtol=1e-5)
    assert scores_NR[fires].min() > 0.8, "the least that makes a rule fire is no near miss"
    assert (read[0][~fires] < -0.1).all(), "nor does a near miss come near"


def test_every_weight_but_the_heads_bias_is_one_rules() -> None:
    model, masks = compile_rules(1.0)
    for name, parameter in model.named_parameters():
        owners = torch.stack([mask[name] for mask in masks.values()])
        assert owners.dtype == torch.bool
        assert owners.shape[1:] == parameter.shape
        assert (owners.sum(0) == (0 if name == "head.bias" else 1)).all(), name


@pytest.mark.parametrize("off", REFERENCE)
def test_without_its_weights_a_rule_is_off_and_the_others_are_as_they_were(
    off: str, words_N: list[list[str]], tokens_NT: Tensor, before_NC: Tensor
) -> None:
    model, masks = compile_rules(1.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter[masks[off][name]] = 0
    after_NC = logits_of(model, tokens_NT)
    (rule,) = (rule for rule in RULES if rule.name == off)
    expected_NC = before_NC.clone()
    scores_N = torch.tensor([rule.score(words) for words in words_N])
    expected_NC[:, rule.pushes] -= rule.push * scores_N.clamp_min(0)
    torch.testing.assert_close(after_NC, expected_NC, atol=1e-5, rtol=1e-5)
    fires_N = scores_N > 0
    torch.testing.assert_close(after_NC[~fires_N], before_NC[~fires_N], atol=1e-6, rtol=0)


def test_an_examples_fisher_lies_in_the_weights_of_the_rules_that_fire_on_it() -> None:
    task = CompiledRulesTask(n_examples=300)
    model, examples, masks = task.model(Path()), task.examples(Path()), task.rule_masks()
    layout = select_parameters(model)
    fishers = PerExampleFishers(model, task.logits, layout, make_sketch(SketchSpec("identity"), layout, 0))
    energy_NP = fishers(examples.batch(range(300))).factors_BRD.double().square().sum(1)
    masks_RP = torch.stack([torch.cat([mask[name].flatten() for name in layout.names]) for mask in masks.values()])
    share_NR = energy_NP @ masks_RP.double().T / energy_NP.sum(1, keepdim=True)
    table = examples.table()
    fires_NR = torch.tensor(np.stack([table[f"rule_{name}"].to_numpy() for name in masks], axis=1))
    assert (share_NR[~fires_NR] == 0).all(), "a rule that does not fire has no gradient"
    assert (share_NR[fires_NR] > 0).all()
    alone_N = fires_NR.sum(1) == 1
    shares = share_NR[fires_NR & alone_N[:, None]]
    assert shares.min() > 0.98, f"of examples of one rule; on average {shares.mean():.4f}"
    none_N = fires_NR.sum(1) == 0
    assert none_N.any()
    assert (share_NR[none_N] == 0).all(), "all that is left is the bias of the head"


def test_predictions_are_moderate() -> None:
    task = CompiledRulesTask(n_examples=500)
    probabilities = logits_of(task.model(Path()), task.examples(Path()).batch(range(500))).softmax(1)
    largest = probabilities.max(1).values
    assert largest.median() < 0.9
    assert probabilities.min() > 1e-6


def test_rules_fire_at_the_stated_rates() -> None:
    table = CompiledRulesTask(n_examples=3000, none_share=0.2, pair_share=0.3).examples(Path()).table()
    counts = np.bincount(table["n_rules"].to_numpy())
    np.testing.assert_allclose(counts / 3000, [0.2, 0.5, 0.3], atol=0.03)
    for rule in RULES:
        assert table[f"rule_{rule.name}"].to_numpy().mean() == pytest.approx(1.1 / len(RULES), abs=0.025)


def test_the_table_describes_the_sequences() -> None:
    task = load_task("compiled-rules", {"n_examples": 50})
    examples = task.examples(Path())
    table = examples.table()
    assert len(examples) == len(table) == 50
    assert len(set(table["id"].to_pylist())) == 50
    words_N = [text.split() for text in table["text"].to_pylist()]
    assert {len(words) for words in words_N} == {LENGTH}
    assert torch.equal(tokens_of(words_N)[[3, 1]], examples.batch([3, 1]))
    assert table["n_rules"].to_pylist() == [sum(fired(words)) for words in words_N]
    logits_NC = logits_of(task.model(Path()), examples.batch(range(50)))
    assert table["label"].to_pylist() == logits_NC.argmax(1).tolist()
    assert tuple(examples.class_names) == CLASSES


def test_the_same_seed_draws_the_same_examples_and_noise_changes_labels_alone() -> None:
    def table(**options: float) -> dict[str, list[object]]:
        return load_task("compiled-rules", {"n_examples": 400, **options}).examples(Path()).table().to_pydict()

    assert table() == table()
    assert table()["text"] != table(seed=1)["text"]
    noisy = table(label_noise=0.25)
    changed = np.array(noisy.pop("label")) != np.array(table()["label"])
    assert changed.mean() == pytest.approx(0.25, abs=0.07)
    assert noisy == {name: column for name, column in table().items() if name != "label"}


@pytest.mark.parametrize("n_active", [1, 2, 3, 4])
def test_the_stated_number_of_rules_fires(n_active: int) -> None:
    def counts(*, at_most: bool) -> list[int]:
        task = CompiledRulesTask(n_examples=300, n_active=n_active, at_most=at_most)
        return np.bincount(task.examples(Path()).table()["n_rules"].to_numpy(), minlength=5).tolist()

    assert counts(at_most=False) == [300 * (count == n_active) for count in range(5)]
    shares = np.array(counts(at_most=True)) / 300
    np.testing.assert_allclose(shares, [(1 <= count <= n_active) / n_active for count in range(5)], atol=0.1)


def test_strengths_are_what_the_rules_add_to_the_logits() -> None:
    task = CompiledRulesTask(n_examples=200, n_active=3, strength=1.5)
    examples = task.examples(Path())
    table = examples.table()
    strengths_NR = np.stack([table[f"strength_{rule.name}"].to_numpy() for rule in RULES], 1)
    fired_NR = np.stack([table[f"rule_{rule.name}"].to_numpy() for rule in RULES], 1)
    assert ((strengths_NR > 0) == fired_NR).all()
    classes_RC = np.eye(len(CLASSES))[[rule.pushes for rule in RULES]]
    expected_NC = strengths_NR @ classes_RC + np.array([1.5 * DEFAULT_PUSH, 0, 0])
    logits_NC = logits_of(task.model(Path()), examples.batch(range(200)))
    np.testing.assert_allclose(logits_NC, expected_NC, rtol=1e-4, atol=1e-4)


def test_with_separate_outputs_each_rule_has_an_output_of_its_own() -> None:
    task = CompiledRulesTask(n_examples=60, n_active=3, separate_outputs=True)
    examples = task.examples(Path())
    table, batch = examples.table(), examples.batch(range(60))
    assert tuple(examples.class_names) == ("off", "on")
    assert table["label"].null_count == 60
    fired_NR = np.stack([table[f"rule_{rule.name}"].to_numpy() for rule in RULES], 1)
    assert torch.equal(task.targets(batch), torch.from_numpy(fired_NR).long())
    with torch.no_grad():
        logits_NRC = task.logits(task.model(Path()), batch)
    assert logits_NRC.shape == (60, len(RULES), 2)
    assert not logits_NRC[:, :, 0].any()
    words = [text.split() for text in table["text"].to_pylist()]
    expected_NR = torch.tensor([output_logits(line) for line in words])
    torch.testing.assert_close(logits_NRC[:, :, 1], expected_NR, rtol=1e-4, atol=1e-4)
    off = logits_NRC[:, :, 1][torch.from_numpy(~fired_NR)]
    assert (off < logits_NRC[:, :, 1][torch.from_numpy(fired_NR)].min() - 3).all()
    same = CompiledRulesTask(n_examples=60, n_active=3).examples(Path())
    assert same.table()["text"].to_pylist() == table["text"].to_pylist(), "the outputs do not change the sequences"
    assert torch.equal(same.batch(range(60)), batch["tokens"])


def test_with_separate_outputs_a_fisher_is_the_sum_of_those_of_its_rules() -> None:
    """Of the output of a rule that fires, nearly all of the Fisher lies in this rule's weights."""
    task = CompiledRulesTask(n_examples=60, n_active=3, separate_outputs=True)
    model, examples, masks = task.model(Path()), task.examples(Path()), task.rule_masks()
    layout = select_parameters(model)
    sketch = make_sketch(SketchSpec("identity"), layout, 0)
    batch = examples.batch(range(60))
    fired_NR = task.targets(batch).bool()
    for unit, name in enumerate(masks):
        fishers = PerExampleFishers(model, lambda m, b, unit=unit: task.logits(m, b)[:, unit], layout, sketch)
        energy_NP = fishers(batch).factors_BRD.double().square().sum(1)
        own_P = torch.cat([masks[name][key].flatten() for key in layout.names])
        shares_N = energy_NP[:, own_P].sum(1) / energy_NP.sum(1)
        assert shares_N[fired_NR[:, unit]].min() > 0.6
        assert energy_NP.sum(1)[fired_NR[:, unit]].min() > 5 * energy_NP.sum(1)[~fired_NR[:, unit]].max()


def test_strength_is_a_factor_of_the_logits() -> None:
    weak, strong = (CompiledRulesTask(n_examples=20, strength=strength) for strength in (0.5, 2.0))
    batch = weak.examples(Path()).batch(range(20))
    torch.testing.assert_close(4 * logits_of(weak.model(Path()), batch), logits_of(strong.model(Path()), batch))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": -1}, "seed must not be negative"),
        ({"n_examples": 0}, "n_examples must be at least 1"),
        ({"none_share": -0.1}, "none_share must be between 0 and 1"),
        ({"decoy_share": 1.1}, "decoy_share must be between 0 and 1"),
        ({"label_noise": float("nan")}, "label_noise must be between 0 and 1"),
        ({"none_share": 0.6, "pair_share": 0.5}, "add up to 1.1"),
        ({"strength": 0}, "strength must be above 0"),
        ({"n_active": 0}, "n_active must be from 1 to 4, not 0"),
        ({"n_active": 5}, "n_active must be from 1 to 4, not 5"),
        ({"n_active": "two"}, "n_active must be a whole number or null, not 'two'"),
        ({"n_active": 2, "pair_share": 0.5}, "n_active replaces none_share and pair_share"),
        ({"at_most": True}, "at_most needs n_active"),
        ({"separate_outputs": True, "label_noise": 0.1}, "label_noise needs labels"),
        ({"rules": 3}, "unexpected keyword argument 'rules'"),
        ({"n_examples": "many"}, "n_examples must be a whole number, not 'many'"),
    ],
)
def test_options_that_cannot_be_used_are_refused_in_one_line(options: dict[str, object], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        load_task("compiled-rules", options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("separate_outputs", [False, True])
def test_the_inputs_are_the_embeddings_of_the_words(separate_outputs: bool, tmp_path: Path) -> None:
    options = {"n_examples": 20, "separate_outputs": separate_outputs}
    loaded = ModelSpec("compiled-rules", options, tmp_path, ("*",), (), "cpu").load()
    loaded.check_inputs(range(20))
    inputs = loaded.inputs(loaded.batch(range(20)), 20)
    assert inputs.mask is not None
    assert inputs.group_of is not None
    for tokens, mask, groups in zip(loaded.tokens(range(20)) or [], inputs.mask, inputs.group_of, strict=True):
        words = [token.text for token in tokens]
        assert [word not in (START, TURN) for word in words] == mask.tolist()
        turn = words.index(TURN)
        assert groups.tolist() == [-1, *[0] * (turn - 1), -1, *[1] * (LENGTH - turn - 1)]
