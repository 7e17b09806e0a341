"""Which examples are compared, and with what."""

from __future__ import annotations

import numpy as np
import torch
from npeff.verification import another_component, baseline_examples, random_direction, top_examples


def test_top_examples_are_the_largest_positive_coefficients_among_the_members() -> None:
    coefficients = np.array([0.5, 0.0, 3.0, np.nan, 2.0, 9.0, 2.0])
    members = np.array([True, True, True, True, True, False, True])
    assert top_examples(coefficients, members, 3).tolist() == [2, 4, 6]
    assert top_examples(coefficients, members, 10).tolist() == [2, 4, 6, 0]


def test_the_baseline_is_random_disjoint_and_repeatable() -> None:
    members = np.arange(1000) % 3 == 0
    top = np.array([0, 3, 6])
    baseline = baseline_examples(members, top, 50, seed=1)
    assert len(set(baseline.tolist())) == 50
    assert not set(baseline.tolist()) & set(top.tolist())
    assert members[baseline].all()
    assert baseline.tolist() == baseline_examples(members, top, 50, seed=1).tolist()
    assert baseline.tolist() != baseline_examples(members, top, 50, seed=2).tolist()
    assert baseline.mean() > 300, "drawn from everywhere, not from the beginning"


def test_a_baseline_larger_than_what_is_there_takes_all_of_it() -> None:
    assert baseline_examples(np.ones(5, dtype=bool), np.array([1]), 50, seed=0).tolist() == [0, 2, 3, 4]


def test_another_component_is_any_of_the_others() -> None:
    drawn = [another_component(2, range(4), seed) for seed in range(200)]
    assert {j: drawn.count(j) > 40 for j in set(drawn)} == {0: True, 1: True, 3: True}
    assert another_component(2, range(4), 5) == drawn[5]
    assert {another_component(2, [2, 7, 9], seed) for seed in range(50)} == {7, 9}
    assert another_component(0, [0], 0) is None


def test_a_random_direction_has_the_norm_of_the_real_one_in_every_tensor_and_nothing_else_of_it() -> None:
    torch.manual_seed(0)
    real = {"a": torch.randn(40, 50), "b": 1e-6 * torch.randn(2000), "c": torch.zeros(3)}
    drawn = random_direction(real, seed=5)
    for name, tensor in real.items():
        torch.testing.assert_close(drawn[name].norm(), tensor.norm())
    for name in ("a", "b"):
        cosine = torch.nn.functional.cosine_similarity(real[name].flatten(), drawn[name].flatten(), dim=0)
        assert abs(float(cosine)) < 0.1
    assert all(torch.equal(drawn[name], random_direction(real, seed=5)[name]) for name in real)
    assert not torch.equal(drawn["a"], random_direction(real, seed=6)["a"])
