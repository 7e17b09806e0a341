from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from npeff.factorization import (
    ExampleShard,
    Factorization,
    InvalidProblemError,
    SolverOptions,
    SolverState,
    Statistics,
    advance,
    initial_state,
    initialize,
    match_components,
    merge_candidates,
    solve,
    stopping_reason,
    subsample_indices,
)
from npeff.options.bounds import OptionError
from planted import Planted, planted_fishers
from torch import Tensor


def small_problem(seed: int = 0, noise: float = 0.05) -> Planted:
    """As many active components as ranks: without noise, the model fits exactly."""
    return planted_fishers(n_examples=300, rank=3, dim=24, n_components=6, noise=noise, seed=seed, n_active=3)


def random_start(n_components: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(n_components, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_loss(factors_NRD: Tensor, result: Factorization) -> float:
    h_KD, w_NK, total = result.components_KD, result.coefficients_NK.double(), 0.0
    for a_RD, w_K in zip(factors_NRD.double(), w_NK, strict=True):
        total += float((a_RD.T @ a_RD - (h_KD.T * w_K) @ h_KD).square().sum())
    return total


def pass_over(shards: Sequence[ExampleShard], components_KD: Tensor) -> Statistics:
    statistics = Statistics.zeros(*components_KD.shape)
    for shard in shards:
        statistics.merge(shard.accumulate(components_KD))
    return statistics


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 5))])
def test_planted_components_are_recovered_and_shards_do_not_matter(seed: int) -> None:
    planted = planted_fishers(n_examples=2000, rank=3, dim=256, n_components=16, noise=0.05, seed=seed)
    factors_NRD = torch.from_numpy(planted.factors_NRD).float()
    start_KD = initialize(factors_NRD[torch.from_numpy(subsample_indices(2000, 1024, seed))], 16, seed)
    options = SolverOptions(n_components=16)
    results = [
        solve([ExampleShard(part) for part in factors_NRD.tensor_split(n)], start_KD, options) for n in (1, 2, 5)
    ]
    for result in results:
        assert match_components(result.components_KD.numpy(), planted.components_KD)[1].mean() >= 0.99
        assert result.stopped == "converged"
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        assert dense_loss(factors_NRD, result) == pytest.approx(result.loss, rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_a_random_start_reaches_the_planted_components_through_rejected_and_accepted_steps(seed: int) -> None:
    planted = small_problem(seed)
    shard = ExampleShard(planted.factors_NRD)
    truth = solve([shard], torch.from_numpy(planted.components_KD), SolverOptions(n_components=6))
    results = [solve([shard], random_start(6, 24, start), SolverOptions(n_components=6)) for start in range(6)]
    assert min(result.loss for result in results) == pytest.approx(truth.loss, rel=1e-5)


def test_the_loss_never_rises_over_accepted_steps_and_the_best_accepted_is_returned() -> None:
    planted = small_problem(noise=0.3)
    result = solve([ExampleShard(planted.factors_NRD)], random_start(6, 24), SolverOptions(n_components=6))
    accepted = [record.loss for record in result.history if record.accepted]
    assert accepted == sorted(accepted, reverse=True)
    assert len(accepted) > 3
    assert result.loss <= min(record.loss for record in result.history) * (1 + 1e-12)
    assert result.n_iter == len(result.history) == result.history[-1].iteration
    assert result.explained == pytest.approx(1 - result.loss / 300, rel=1e-9)


def test_the_loss_falls_to_nothing_on_data_the_model_fits_exactly() -> None:
    planted = small_problem(noise=0.0)
    shard = ExampleShard(planted.factors_NRD)
    start_KD = initialize(planted.factors_NRD, 6, seed=0)
    result = solve([shard], start_KD, SolverOptions(n_components=6))
    assert result.loss < 1e-9 * 300
    assert result.stopped == "converged"
    assert match_components(result.components_KD.numpy(), planted.components_KD)[1].min() > 1 - 1e-6


def test_a_rejected_trial_is_repeated_from_the_best_state_with_more_damping() -> None:
    planted = small_problem()
    shard, options = ExampleShard(planted.factors_NRD), SolverOptions(n_components=6)
    state, first = advance(
        initial_state(torch.from_numpy(planted.components_KD), options),
        shard.accumulate(torch.from_numpy(planted.components_KD)),
        options,
    )
    worse = torch.nn.functional.normalize(random_start(6, 24), dim=1)
    rejected, record = advance(
        dataclasses.replace(state, components_KD=worse), ExampleShard(planted.factors_NRD).accumulate(worse), options
    )
    assert first.accepted
    assert not record.accepted
    assert record.loss > first.loss
    assert rejected.mu == 8 * state.mu
    assert rejected.iteration == 2
    assert rejected.n_accepted == 1
    assert rejected.best_objective == first.loss
    assert torch.equal(rejected.best_components_KD, state.best_components_KD)
    shift, shorter = (s.components_KD - s.best_components_KD for s in (state, rejected))
    assert 0 < torch.linalg.norm(shorter) < torch.linalg.norm(shift)


def test_a_trial_whose_loss_is_not_a_number_is_rejected() -> None:
    planted = small_problem()
    h_KD = torch.from_numpy(planted.components_KD)
    options = SolverOptions(n_components=6)
    state, _ = advance(initial_state(h_KD, options), ExampleShard(planted.factors_NRD).accumulate(h_KD), options)
    statistics = ExampleShard(planted.factors_NRD).accumulate(h_KD)
    statistics.wt = math.nan
    assert not advance(state, statistics, options)[1].accepted


def test_a_run_continued_from_its_arrays_is_identical() -> None:
    planted = small_problem(noise=0.3)
    options = SolverOptions(n_components=6)
    shard = ExampleShard(planted.factors_NRD)
    state = initial_state(random_start(6, 24), options)
    for _ in range(4):
        state, _ = advance(state, pass_over([shard], state.components_KD), options)
    resumed = SolverState.from_arrays(state.to_arrays())
    other = ExampleShard(planted.factors_NRD, shard.coefficients_NK.numpy())
    for _ in range(6):
        state, record = advance(state, pass_over([shard], state.components_KD), options)
        resumed, again = advance(resumed, pass_over([other], resumed.components_KD), options)
        assert record == again
    for name, array in state.to_arrays().items():
        np.testing.assert_array_equal(array, resumed.to_arrays()[name])


def test_a_raised_limit_continues_a_finished_run() -> None:
    planted = small_problem(noise=0.3)
    states: list[SolverState] = []
    short = SolverOptions(n_components=6, max_iterations=3)
    result = solve(
        [ExampleShard(planted.factors_NRD)], random_start(6, 24), short, lambda state, _: states.append(state)
    )
    assert result.stopped == "max_iterations"
    assert result.n_iter == len(states) == 3
    assert stopping_reason(states[-1], short) == "max_iterations"
    assert stopping_reason(states[-1], dataclasses.replace(short, max_iterations=4)) is None


def test_endless_rejection_ends_as_stalled() -> None:
    options = SolverOptions(n_components=2)
    state = initial_state(torch.eye(2), options)
    assert stopping_reason(dataclasses.replace(state, mu=1e9), options) == "stalled"


def test_a_dead_component_is_reseeded_from_a_badly_fitted_example_and_comes_to_life() -> None:
    planted = small_problem()
    # One component lies outside the span of the data; another is left without any.
    factors_NRD = torch.cat([torch.from_numpy(planted.factors_NRD), torch.zeros(300, 3, 1)], dim=2)
    start_KD = torch.cat([torch.from_numpy(planted.components_KD), torch.zeros(6, 1)], dim=1)
    start_KD[2] = torch.eye(25)[24]
    result = solve([ExampleShard(factors_NRD)], start_KD, SolverOptions(n_components=6))
    assert result.history[0].n_dead == 1
    assert result.history[-1].n_dead == 0
    assert match_components(result.components_KD[:, :24].numpy(), planted.components_KD)[1].min() > 0.99


def test_reseeding_does_not_depend_on_shards() -> None:
    planted = small_problem()
    factors_NRD, h_KD = torch.from_numpy(planted.factors_NRD), torch.from_numpy(planted.components_KD).clone()
    options = SolverOptions(n_components=6)
    trials = []
    for n_shards in (1, 4):
        shards = [ExampleShard(part) for part in factors_NRD.tensor_split(n_shards)]
        state = initial_state(h_KD, options)
        statistics = pass_over(shards, state.components_KD)
        statistics.ww_KK[3] = statistics.ww_KK[:, 3] = statistics.u_KD[3] = 0.0
        candidates = merge_candidates([shard.candidates(state.components_KD) for shard in shards])
        state, record = advance(state, statistics, options, candidates)
        assert record.n_dead == 1
        assert float((state.components_KD[3] @ candidates.directions_MD[0]).abs()) == pytest.approx(1.0)
        trials.append(state.components_KD)
    cosines = (trials[0] * trials[1]).sum(dim=1).abs()
    torch.testing.assert_close(cosines, torch.ones(6, dtype=torch.float64), rtol=1e-9, atol=0)


def test_components_that_no_example_uses_at_all_are_all_replaced() -> None:
    factors_NRD = torch.zeros(10, 1, 4, dtype=torch.float64)
    factors_NRD[:, 0, 0] = 1.0
    result = solve([ExampleShard(factors_NRD)], torch.eye(4)[2:3], SolverOptions(n_components=1))
    assert result.history[0].n_dead == 1
    assert result.loss < 1e-12


def test_more_components_than_dimensions_are_solved() -> None:
    planted = planted_fishers(n_examples=200, rank=2, dim=5, n_components=8, noise=0.0, seed=0, n_active=2)
    result = solve(
        [ExampleShard(planted.factors_NRD)], initialize(planted.factors_NRD, 8, seed=0), SolverOptions(n_components=8)
    )
    assert result.explained > 0.95
    assert torch.isfinite(result.coefficients_NK).all()


def test_components_come_by_descending_energy_with_their_largest_entry_positive() -> None:
    planted = small_problem()
    result = solve([ExampleShard(planted.factors_NRD)], random_start(6, 24), SolverOptions(n_components=6))
    energy_K = result.coefficients_NK.square().sum(dim=0)
    assert (energy_K.diff() <= 0).all()
    largest = result.components_KD.abs().argmax(dim=1, keepdim=True)
    assert (result.components_KD.gather(1, largest) > 0).all()
    torch.testing.assert_close(result.components_KD.norm(dim=1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("factors", "n_components", "message"),
    [
        (torch.zeros(4, 2, 3), 1, "every factor is zero"),
        (torch.ones(2, 2, 3), 5, "exceeds the 4 factor rows"),
        (torch.zeros(0, 2, 3), 1, "no examples"),
    ],
)
def test_impossible_problems_are_refused(factors: Tensor, n_components: int, message: str) -> None:
    with pytest.raises(InvalidProblemError, match=message):
        solve([ExampleShard(factors)], random_start(n_components, 3), SolverOptions(n_components=n_components))


def test_no_shards_are_no_examples() -> None:
    with pytest.raises(InvalidProblemError, match="no examples"):
        solve([], random_start(1, 3), SolverOptions(n_components=1))


@pytest.mark.parametrize("start", [torch.ones(3, 4), torch.zeros(2, 4), torch.full((2, 4), math.nan)])
def test_unusable_starts_are_refused(start: Tensor) -> None:
    with pytest.raises(InvalidProblemError, match="start"):
        initial_state(start, SolverOptions(n_components=2))


@pytest.mark.parametrize("wrong", [{"n_components": 0}, {"max_iterations": 0}, {"tolerance": -1.0}, {"n_starts": 0}])
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        SolverOptions(**({"n_components": 2} | wrong))  # type: ignore[arg-type]
