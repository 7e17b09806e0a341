from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import planted_fishers

from pipeline.factorization import ExampleShard, InvalidProblemError, initialize, match_components, subsample_indices


def test_a_subsample_is_distinct_ascending_and_the_same_again() -> None:
    indices = subsample_indices(1000, 64, seed=3)
    assert len(indices) == 64
    assert (np.diff(indices) > 0).all()
    assert indices[0] >= 0
    assert indices[-1] < 1000
    np.testing.assert_array_equal(indices, subsample_indices(1000, 64, seed=3))
    assert not np.array_equal(indices, subsample_indices(1000, 64, seed=4))


def test_a_subsample_as_large_as_the_data_is_the_data() -> None:
    np.testing.assert_array_equal(subsample_indices(5, 5, seed=0), np.arange(5))
    np.testing.assert_array_equal(subsample_indices(5, 9, seed=0), np.arange(5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_starts_are_close_to_the_planted_components(dtype: torch.dtype) -> None:
    planted = planted_fishers(n_examples=400, rank=3, dim=60, n_components=8, noise=0.05, seed=0, n_active=3)
    start_KD = initialize(torch.from_numpy(planted.factors_NRD).to(dtype), 8, seed=0, n_starts=2)
    assert match_components(start_KD.numpy(), planted.components_KD)[1].min() > 0.98


def test_starts_depend_on_the_seed_and_nothing_else() -> None:
    planted = planted_fishers(n_examples=100, rank=2, dim=20, n_components=8, noise=0.5, seed=0, n_active=3)
    first, again, other = (initialize(planted.factors_NRD, 4, seed=seed, n_starts=2) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_more_starts_never_give_a_worse_one() -> None:
    planted = planted_fishers(n_examples=150, rank=2, dim=20, n_components=12, noise=0.5, seed=1, n_active=3)
    losses = []
    for n_starts in (1, 2, 6):
        start_KD = initialize(planted.factors_NRD, 6, seed=5, n_starts=n_starts)
        losses.append(ExampleShard(planted.factors_NRD).finish(start_KD).loss(start_KD))
    assert losses[0] >= losses[1] * (1 - 1e-9) >= losses[2] * (1 - 1e-9) ** 2
    assert losses[0] > losses[2]


@pytest.mark.parametrize(
    ("n_examples", "rank", "dim", "n_components"),
    [(30, 2, 4, 9), (3, 2, 50, 6), (4, 1, 3, 4), (1, 1, 1, 1), (40, 3, 100, 1)],
)
def test_any_number_of_components_up_to_the_factor_rows_gets_a_start(
    n_examples: int, rank: int, dim: int, n_components: int
) -> None:
    planted = planted_fishers(n_examples=n_examples, rank=rank, dim=dim, n_components=3, noise=0.1, seed=0, n_active=2)
    start_KD = initialize(planted.factors_NRD, n_components, seed=0)
    torch.testing.assert_close(start_KD.norm(dim=1), torch.ones(n_components, dtype=torch.float64))


def test_components_beyond_the_rank_of_the_data_still_get_a_start() -> None:
    factors_NRD = torch.zeros(50, 2, 10)
    factors_NRD[:25, 0, 0] = factors_NRD[25:, 0, 1] = 1.0
    start_KD = initialize(factors_NRD, 5, seed=0)
    torch.testing.assert_close(start_KD.norm(dim=1), torch.ones(5, dtype=torch.float64))
    assert ExampleShard(factors_NRD).finish(start_KD).loss(start_KD) < 1e-6


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (torch.zeros(4, 2, 3), "every factor is zero"),
        (torch.ones(1, 1, 3), "exceeds"),
        (torch.full((4, 2, 3), float("inf")), "not finite"),
    ],
)
def test_impossible_problems_are_refused(factors: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidProblemError, match=message):
        initialize(factors, 2, seed=0)
