from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from npeff.factorization import canonical_order, match_components, near_duplicates


def test_shuffled_rescaled_and_flipped_components_are_matched_exactly() -> None:
    rng = np.random.default_rng(0)
    a_KD, order = rng.standard_normal((6, 9)), rng.permutation(6)
    b_KD = a_KD[order] * rng.choice([-3.0, 0.5], size=(6, 1))
    pairs, cosines = match_components(a_KD, b_KD)
    np.testing.assert_array_equal(order[pairs[:, 1]], pairs[:, 0])
    np.testing.assert_allclose(cosines, 1.0)


def test_the_matching_is_the_best_in_total_not_greedy() -> None:
    a = np.array([[1.0, 0.0], [np.cos(0.2), np.sin(0.2)]])
    # The first row of b is closest to both; giving it to the closest (the second of a) is best for both together.
    b = np.array([[np.cos(0.15), np.sin(0.15)], [np.cos(-0.6), np.sin(-0.6)]])
    pairs, cosines = match_components(a, b)
    assert pairs.tolist() == [[0, 1], [1, 0]]
    np.testing.assert_allclose(cosines, np.cos([0.6, 0.05]))


def test_the_smaller_set_is_matched_whole_and_zero_rows_match_nothing() -> None:
    a = np.vstack([np.eye(4)[:2], np.zeros(4)])
    pairs, cosines = match_components(a, np.eye(4))
    assert pairs[:2].tolist() == [[0, 0], [1, 1]]
    assert cosines.tolist() == [1.0, 1.0, 0.0]
    assert match_components(np.eye(4), a[:2])[0].tolist() == [[0, 0], [1, 1]]


def test_canonical_order_undoes_any_order_and_signs() -> None:
    h_KD, energy_K = (
        torch.randn(5, 7, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3.0, 1.0, 5.0, 4.0, 2.0]),
    )
    shuffle, flips = torch.tensor([4, 2, 0, 1, 3]), torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    expected, other = (
        h[order] * signs[:, None]
        for h, (order, signs) in (
            (h_KD, canonical_order(h_KD, energy_K)),
            (h_KD[shuffle] * flips[:, None], canonical_order(h_KD[shuffle] * flips[:, None], energy_K[shuffle])),
        )
    )
    assert torch.equal(expected, other)


def test_near_duplicates_are_reported_with_either_sign() -> None:
    h_KD = torch.eye(3, dtype=torch.float64)
    h_KD[2] = -torch.nn.functional.normalize(torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64), dim=0)
    assert near_duplicates(h_KD) == [(0, 2, pytest.approx(-1 / math.sqrt(1.01)))]
