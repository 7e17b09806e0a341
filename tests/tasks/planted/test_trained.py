"""Trained rules: the cues are what they are said to be, and the network computes the program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.tasks import TaskError, load_task
from npeff.tasks.planted.trained import CLASSES, N_RULES, PUSHES, TrainedRulesTask, program_logits, strengths
from tasks.planted.training import check_trained_once

NAME = "trained-rules"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedRulesTask, Path]:
    folder = tmp_path_factory.mktemp("task")
    task = TrainedRulesTask(n_examples=600, n_active=4, steps=800)
    task.prepare(folder)
    return task, folder


def test_a_rule_is_active_where_both_of_its_cues_are_present() -> None:
    examples = load_task(NAME, {"n_examples": 300, "n_active": 4, "decoy_share": 0.5}).examples(Path())
    cues_NE, table = examples.batch(range(300)).numpy(), examples.table()
    for rule in range(N_RULES):
        first_N, second_N = cues_NE[:, 2 * rule], cues_NE[:, 2 * rule + 1]
        active_N = (first_N > 0) & (second_N > 0)
        assert (table[f"rule_pair_{rule:02d}"].to_numpy() == active_N).all()
        assert (first_N[active_N] == second_N[active_N]).all()
        expected_N = np.where(active_N, PUSHES[rule] * first_N.astype(np.float64), 0)
        np.testing.assert_allclose(table[f"strength_pair_{rule:02d}"].to_numpy(), expected_N)
        decoys_N = (first_N > 0) != (second_N > 0)
        assert decoys_N[~active_N].mean() == pytest.approx(0.5, abs=0.12)


def test_logits_of_the_program_are_sums_over_the_rules_of_a_class() -> None:
    cues_NE = TrainedRulesTask(n_examples=50).examples(Path()).batch(range(50)).numpy()
    for logits_C, strengths_R in zip(program_logits(cues_NE), strengths(cues_NE), strict=True):
        expected = [sum(strengths_R[rule] for rule in range(N_RULES) if rule % 4 == c) for c in range(len(CLASSES))]
        np.testing.assert_allclose(logits_C, expected)


@pytest.mark.parametrize(("at_most", "expected"), [(True, [0, 1 / 3, 1 / 3, 1 / 3]), (False, [0, 0, 0, 1])])
def test_the_stated_number_of_rules_is_active(at_most: bool, expected: list[float]) -> None:
    table = TrainedRulesTask(n_examples=1500, n_active=3, at_most=at_most).examples(Path()).table()
    shares = np.bincount(table["n_rules"].to_numpy()) / 1500
    np.testing.assert_allclose(shares, expected, atol=0.05)
    for rule in range(N_RULES):
        mean = (2 if at_most else 3) / N_RULES
        assert table[f"rule_pair_{rule:02d}"].to_numpy().mean() == pytest.approx(mean, abs=0.05)


def test_the_network_computes_the_program(trained: tuple[TrainedRulesTask, Path]) -> None:
    task, folder = trained
    cues_NE = task.examples(folder).batch(range(600))
    log_p_NC = torch.from_numpy(program_logits(cues_NE.numpy())).log_softmax(1)
    with torch.no_grad():
        log_q_NC = task.logits(task.model(folder), cues_NE).double().log_softmax(1)
    kl_N = (log_p_NC.exp() * (log_p_NC - log_q_NC)).sum(1)
    uniform_N = np.log(len(CLASSES)) + (log_p_NC.exp() * log_p_NC).sum(1)
    assert kl_N.mean() < 0.05 * uniform_N.mean()


def test_masks_are_the_weights_at_the_cues_of_a_rule(trained: tuple[TrainedRulesTask, Path]) -> None:
    """Without these weights, the logits of the program without the rule remain; cues of other rules are not touched."""
    task, folder = trained
    model, masks = task.model(folder), task.rule_masks()
    assert list(masks) == [f"pair_{rule:02d}" for rule in range(N_RULES)]
    cues_NE = task.examples(folder).batch(range(600))
    without_NE = cues_NE.clone()
    without_NE[:, 4:6] = 0
    with torch.no_grad():
        expected_NC = model(without_NE)
        for name, parameter in model.named_parameters():
            parameter[masks["pair_02"][name]] = 0
        torch.testing.assert_close(model(cues_NE), expected_NC, rtol=1e-4, atol=1e-4)
    owners = torch.stack([mask["0.weight"] for mask in masks.values()]).sum(0)
    assert owners[:, : 2 * N_RULES].eq(1).all()
    assert owners[:, 2 * N_RULES :].eq(0).all()


def test_the_network_is_trained_once_and_the_same_way_every_time(tmp_path: Path) -> None:
    check_trained_once(lambda: TrainedRulesTask(n_examples=2, steps=5), tmp_path)


def test_a_seed_gives_the_same_examples_again_and_another_seed_others() -> None:
    def table(seed: int) -> dict[str, list[object]]:
        return TrainedRulesTask(seed=seed, n_examples=40).examples(Path()).table().to_pydict()

    assert table(0) == table(0)
    assert table(0)["text"] != table(1)["text"]
    assert len(set(table(0)["id"])) == 40


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"n_active": 0}, "n_active must be from 1 to 6, not 0"),
        ({"n_active": 7}, "n_active must be from 1 to 6, not 7"),
        ({"n_active": None}, "n_active must be a whole number, not None"),
        ({"n_active": 2.5}, "n_active must be a whole number"),
        ({"n_active": True}, "n_active must be a whole number"),
        ({"steps": 0}, "steps must be a whole number between 1 and"),
        ({"n_examples": "many"}, "n_examples must be a whole number"),
        ({"decoy_share": 1.5}, "decoy_share must be between 0 and 1, not 1.5"),
        ({"seed": -1}, "seed must be a whole number between 0"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict[str, object], said: str) -> None:
    with pytest.raises(TaskError) as caught:
        load_task(NAME, options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cues_of_a_rule_are_a_group_of_inputs(trained: tuple[TrainedRulesTask, Path]) -> None:
    task, folder = trained
    spec = ModelSpec(NAME, {}, folder, ("*",), (), "cpu")
    loaded = LoadedModel(spec, task, task.model(folder), task.examples(folder), torch.device("cpu"))
    loaded.check_inputs([0, 1, 2])
    inputs = loaded.inputs(loaded.batch([0, 1, 2]), 3)
    assert inputs.names[:4] == ("a00", "b00", "a01", "b01")
    assert inputs.group_of is not None
    assert inputs.group_of.tolist() == [*np.repeat(range(N_RULES), 2), *[-1] * 8]
    assert [name.removeprefix("pair_") for name in inputs.groups] == [name[1:] for name in inputs.names[:24:2]]
