"""The network of the digits is trained as `torch.optim` would train it."""

from __future__ import annotations

from pathlib import Path

import torch
from npeff.models.loaded import ModelSpec
from npeff.tasks import digits
from npeff.tasks.digits import DigitsTask
from npeff.tasks.trained_model import trained_classifier
from torch import nn


def test_training_is_that_of_torchs_optimizer_whatever_the_number_of_threads() -> None:
    task = DigitsTask(train_examples=200, epochs=2)
    pixels, targets = task._train
    expected = digits._network(0)
    optimizer = torch.optim.AdamW(expected.parameters(), lr=3e-3, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for batch in torch.randperm(len(pixels), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(expected(pixels[batch]), targets[batch]).backward()
            optimizer.step()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = trained_classifier(digits._network(0), pixels, targets, epochs=2, seed=0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    for parameter, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-5)


def test_the_inputs_are_the_pixels(tmp_path: Path) -> None:
    spec = ModelSpec("digits", {"epochs": 1, "train_examples": 50}, tmp_path, ("*",), (), "cpu")
    spec.prepare()
    loaded = spec.load()
    loaded.check_inputs([0, 1])
    flat = loaded.flat_inputs(loaded.batch([0, 1]), 2)
    assert flat.values_BPF.shape == (2, 64, 1)
    assert not flat.exchangeable
    assert torch.equal(flat.values_BPF.view(2, 1, 8, 8), loaded.batch([0, 1]))
