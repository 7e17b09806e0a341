from __future__ import annotations

import numpy as np
import pytest
import torch
from npeff.factorization import (
    ExampleShard,
    InvalidProblemError,
    SolverOptions,
    initialize,
    match_components,
    most_useful,
    n_candidates,
    starting_components,
    subsample_indices,
)
from planted import planted_fishers


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


def test_what_is_taken_away_is_what_a_refit_misses_least() -> None:
    """Against the definition: the loss after each removal, with all remaining coefficients refitted, signs free."""
    rng = torch.Generator().manual_seed(0)
    h_CD = torch.nn.functional.normalize(torch.randn(9, 12, dtype=torch.float64, generator=rng) + 0.4, dim=1)
    targets_NC = torch.rand(50, 9, dtype=torch.float64, generator=rng)
    gram_CC = (h_CD @ h_CD.T).square()
    w_NC = torch.linalg.solve(gram_CC, targets_NC.T).T

    def loss_without(gone: list[int]) -> float:
        left = [j for j in range(9) if j not in gone]
        t, g = targets_NC[:, left], gram_CC[left][:, left]
        return -float((t * torch.linalg.solve(g, t.T).T).sum())

    for n_frozen in (0, 3):
        gone: list[int] = []
        for n_components in range(8, 3, -1):
            free = [j for j in range(n_frozen, 9) if j not in gone]
            gone.append(min(free, key=lambda j: loss_without([*gone, j])))
            kept_C = most_useful(h_CD, w_NC.T @ w_NC, n_components, n_frozen)
            assert kept_C.tolist() == [j not in gone for j in range(9)]


def test_coefficient_products_are_those_of_the_optimal_coefficients() -> None:
    planted = planted_fishers(n_examples=300, rank=3, dim=24, n_components=6, noise=0.2, seed=0)
    h_KD = torch.from_numpy(planted.components_KD)
    weights_N = torch.arange(300) % 3
    shard = ExampleShard(planted.factors_NRD, weights_N=weights_N)
    found = shard.coefficient_products(h_KD)
    assert shard.coefficients_NK.shape[1] == 0
    shard.finish(h_KD)
    w_NK = shard.coefficients_NK
    torch.testing.assert_close(found, (w_NK * weights_N[:, None]).T @ w_NK, rtol=1e-3, atol=1e-3)


def test_of_more_true_components_the_most_useful_to_all_examples_are_chosen() -> None:
    """Examples outside the subsample of 150 use some components ten times as often."""
    planted = planted_fishers(
        n_examples=3000, rank=3, dim=48, n_components=10, noise=0.05, n_active=2, seed=3, zipf=1.0
    )
    shard = ExampleShard(planted.factors_NRD)
    options = SolverOptions(n_components=8, subsample=150)
    start_KD = starting_components(shard, options)
    shard.finish(torch.from_numpy(planted.components_KD))
    energy_K = shard.coefficients_NK.square().sum(0)
    pairs, cosines = match_components(start_KD.numpy(), planted.components_KD)
    assert cosines.min() > 0.95
    assert set(pairs[:, 1].tolist()) == set(energy_K.argsort(descending=True)[:8].tolist())


@pytest.mark.parametrize(("shape", "expected"), [((100, 3, 64), 10), ((100, 3, 9), 9), ((3, 3, 64), 9), ((2, 4, 6), 8)])
def test_there_are_no_more_candidates_than_factor_rows_or_dimensions(shape: tuple[int, ...], expected: int) -> None:
    assert n_candidates(8, shape) == expected


def test_examples_without_weight_are_nothing_to_start_from() -> None:
    with pytest.raises(InvalidProblemError, match="weight zero"):
        starting_components(ExampleShard(np.ones((3, 1, 2)), weights_N=np.zeros(3)), SolverOptions(n_components=1))


def test_examples_that_say_nothing_do_not_hide_the_others() -> None:
    planted = planted_fishers(n_examples=100, rank=3, dim=24, n_components=4, noise=0.05, seed=0)
    factors_NRD = np.zeros((200, 3, 24))
    factors_NRD[1::2] = planted.factors_NRD
    for weights_M in (None, np.arange(200) % 2):
        start_KD = initialize(factors_NRD, 4, seed=0, weights_M=weights_M)
        assert match_components(start_KD.numpy(), planted.components_KD)[1].min() > 0.98
