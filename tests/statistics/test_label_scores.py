"""Detection and intruder scores against their definitions, pair by pair and draw by draw."""

from __future__ import annotations

import numpy as np
import pytest
from npeff.statistics.label_scores import MEMBERS, detection, intruder


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_detection_is_the_fraction_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    name, top, others = unit(rng.standard_normal(8)), *(unit(rng.standard_normal((n, 8))) for n in (12, 30))
    others[:3] = top[:3]  # equal cosines
    pairs = [np.sign(a @ name - b @ name) / 2 + 0.5 for a in top for b in others]
    assert detection(name, top, others) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert detection(name, np.stack([name] * 2), -np.stack([name] * 3)) == 1.0
    assert detection(-name, np.stack([name] * 2), -np.stack([name] * 3)) == 0.0


def test_scores_of_too_few_examples_are_not_known() -> None:
    rows, rng = unit(np.random.default_rng(0).standard_normal((MEMBERS, 3))), np.random.default_rng(0)
    assert detection(rows[0], rows[:0], rows) is None
    assert detection(rows[0], rows, rows[:0]) is None
    assert intruder(rows[:-1], rows, 10, rng) is None
    assert intruder(rows, rows[:0], 10, rng) is None


def test_an_intruder_is_found_among_examples_that_are_alike_and_not_among_equal_ones() -> None:
    rng = np.random.default_rng(0)
    top = unit(np.array([1.0, 0.0, 0.0]) + 0.1 * rng.standard_normal((10, 3)))
    others = unit(np.array([0.0, 1.0, 0.0]) + 0.1 * rng.standard_normal((10, 3)))
    assert intruder(top, others, 50, rng) == 1.0
    same = np.tile(top[:1], (10, 1))
    assert intruder(same, same, 50, rng) == 0.0


def test_a_guess_finds_one_intruder_in_five() -> None:
    rng = np.random.default_rng(0)
    top, others = (unit(rng.standard_normal((400, 64))) for _ in range(2))
    found = intruder(top, others, 2000, rng)
    assert found is not None
    assert abs(found - 1 / (MEMBERS + 1)) < 4 * np.sqrt(0.2 * 0.8 / 2000)
