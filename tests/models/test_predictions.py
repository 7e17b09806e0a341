"""Predictions of many examples at once, against one example after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from npeff.models import predictions
from npeff.models.predictions import Predictions, kl_divergence


def drawn(sizes: list[int], n_classes: int, seed: int) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    return Predictions([3 * torch.randn(size, n_classes, generator=generator) for size in sizes], [])


@pytest.mark.parametrize("block", [1, 25, 2**15])
@pytest.mark.parametrize("sizes", [[1] * 9, [3, 1, 0, 7, 0, 1, 2], [0]])
def test_kl_is_the_mean_over_the_predictions_of_each_example(
    block: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "_BLOCK", block)
    moved, original = drawn(sizes, 5, 0), drawn(sizes, 5, 1)
    one_by_one = [kl_divergence(*pair).mean().item() for pair in zip(moved.logits, original.logits, strict=True)]
    np.testing.assert_allclose(moved.kl(original), one_by_one, rtol=1e-12)


def test_no_examples_have_no_kl() -> None:
    assert Predictions([], []).kl(Predictions([], [])).shape == (0,)
