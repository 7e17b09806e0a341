"""The benchmark's model with permuted weights is the model of another task with the entries of its tensors permuted."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from methods_stage.permuted import PermutedTask
from npeff.tasks.digits import DigitsTask

_OPTIONS = {"train_examples": 200, "epochs": 6, "limit": 50}


def _permuted(seed: int) -> PermutedTask:
    return PermutedTask("digits", _OPTIONS, include=["*"], exclude=["*.bias"], seed=seed)


def test_only_selected_parameters_are_permuted_with_a_seed_and_keep_their_entries(tmp_path: Path) -> None:
    task, permuted = DigitsTask(**_OPTIONS), _permuted(1)
    permuted.prepare(tmp_path)
    before, after = task.model(tmp_path), permuted.model(tmp_path)
    again, other = _permuted(1).model(tmp_path).state_dict(), _permuted(2).model(tmp_path).state_dict()
    for name, value in before.state_dict().items():
        found = after.state_dict()[name]
        assert torch.equal(found, again[name])
        assert torch.equal(found.flatten().sort().values, value.flatten().sort().values)
        assert torch.equal(found, value) == name.endswith(".bias")
        assert torch.equal(found, other[name]) == name.endswith(".bias")
    batch = permuted.examples(tmp_path).batch(range(50))
    assert torch.equal(batch, task.examples(tmp_path).batch(range(50)))
    classes, former = permuted.logits(after, batch).argmax(1), task.logits(before, batch).argmax(1)
    assert (classes != former).float().mean() > 0.5
