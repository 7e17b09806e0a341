"""Changes of the predictions by a step equal their definition, one prediction at a time."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from npeff.verification import shifts
from torch import Tensor

N_CLASSES = 7


def logits(lengths: list[int], seed: int, n_classes: int = N_CLASSES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(length, n_classes, generator=generator) for length in lengths]


def softmax(row: Tensor) -> list[float]:
    exponentials = [math.exp(value) for value in row.tolist()]
    return [value / sum(exponentials) for value in exponentials]


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("block", [1, 30, 2**20])
@pytest.mark.parametrize("lengths", [[1] * 12, [3, 1, 0, 5, 2], [4, 4]])
def test_every_value_is_that_of_its_definition(lengths: list[int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npeff.verification.prediction_shifts._BLOCK", block)
    before, after = logits(lengths, 0), logits(lengths, 1)
    found = shifts(before, after)
    n = sum(length > 0 for length in lengths)
    p_C, q_C, old_C, new_C = (Counter[int]() for _ in range(4))
    flips: Counter[tuple[int, int]] = Counter()
    for number, (unmoved, moved) in enumerate(zip(before, after, strict=True)):
        rows = [(softmax(one), softmax(other)) for one, other in zip(unmoved, moved, strict=True)]
        for p, q in rows:
            weight, old, new = 1 / (n * len(rows)), int(np.argmax(p)), int(np.argmax(q))
            for c in range(N_CLASSES):
                p_C[c] += weight * p[c]  # type: ignore[assignment]
                q_C[c] += weight * q[c]  # type: ignore[assignment]
            old_C[old] += weight  # type: ignore[assignment]
            new_C[new] += weight  # type: ignore[assignment]
            if old != new:
                flips[old, new] += weight  # type: ignore[assignment]
        shift = found.examples[number]
        assert (shift is None) == (not rows)
        if shift is not None:
            place = max(range(len(rows)), key=lambda i: kl(rows[i][1], rows[i][0]))
            p, q = rows[place]
            assert (shift.place, shift.class_before, shift.class_after) == (place, np.argmax(p), np.argmax(q))
            wanted = [p[shift.class_before], q[shift.class_before], q[shift.class_after]]
            assert [shift.p_before, shift.p_after, shift.p_new] == pytest.approx(wanted, rel=1e-6)
    assert [shift.number for shift in found.classes] == list(range(N_CLASSES))
    for shift in found.classes:
        values = [shift.p_before, shift.p_after, shift.share_before, shift.share_after]
        assert values == pytest.approx([each[shift.number] for each in (p_C, q_C, old_C, new_C)], rel=1e-6)
    assert found.flips == pytest.approx(dict(flips))
    assert list(found.flips.values()) == sorted(found.flips.values(), reverse=True)


def test_one_tensor_for_all_examples_gives_the_same() -> None:
    before, after = logits([2] * 6, 0), logits([2] * 6, 1)
    assert shifts(torch.stack(before), torch.stack(after)) == shifts(before, after)


def test_of_many_classes_those_that_change_most_are_listed() -> None:
    before, after = logits([5] * 4, 0, 60), logits([5] * 4, 1, 60)
    changes = torch.stack(after).double().softmax(-1).mean((0, 1)) - torch.stack(before).double().softmax(-1).mean(
        (0, 1)
    )
    order = changes.argsort().tolist()
    assert [shift.number for shift in shifts(before, after, listed=4).classes] == sorted(order[:4] + order[-4:])


def test_a_certain_class_and_logits_that_are_not_finite_raise_nothing() -> None:
    before = torch.tensor([[[1e4, 0.0]], [[0.0, 1.0]]])
    found = shifts(before, torch.tensor([[[0.0, 1e4]], [[math.nan, math.inf]]]))
    first = found.examples[0]
    assert first is not None
    assert (first.p_before, first.p_after, first.p_new) == (1.0, 0.0, 1.0)
    assert all(math.isnan(shift.p_after) for shift in found.classes)
    assert shifts([], []).classes == []
