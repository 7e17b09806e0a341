"""The loop over a kind of Fisher, as workers run it, against the solvers that are written for one kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from npeff.factorization import (
    Candidates,
    DiagonalFishers,
    DiagonalShard,
    ExampleShard,
    Factorization,
    FisherKind,
    InvalidProblemError,
    LowRankFishers,
    SolverOptions,
    canonical_order,
    initial_state,
    merge_candidates,
    solve,
    solve_diagonal,
    starting_components,
)
from planted import planted_fishers
from torch import Tensor

N, D, K = 120, 24, 5
OPTIONS = SolverOptions(n_components=K, max_iterations=8, tolerance=1e-12)


class Alone:
    """One worker."""

    rank = 0

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Case:
    kind: FisherKind[Any, Any, Any]
    parts: list[Any]
    """Fishers of the examples of two workers."""
    shard: type
    start_KD: Tensor
    expected: Factorization


def low_rank() -> Case:
    options = SolverOptions(n_components=K, max_iterations=8, tolerance=1e-12, l1=0.02, orthogonality=0.01)
    factors_NRD = planted_fishers(n_examples=N, rank=3, dim=D - 1, n_components=6, noise=0.1, seed=0).factors_NRD
    parts = list(torch.from_numpy(np.pad(factors_NRD, [(0, 0), (0, 0), (0, 1)])).split([70, 50]))
    start_KD = torch.randn(K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start_KD[2] = torch.eye(D)[-1]  # no example uses the last coordinate
    expected = solve([ExampleShard(part) for part in parts], start_KD, options)
    return Case(LowRankFishers(options), parts, ExampleShard, start_KD, expected)


def diagonal() -> Case:
    rng = np.random.default_rng(0)
    fishers_ND = (rng.random((N, 6)) * (rng.random((N, 6)) < 0.5) + 0.01) @ rng.random((6, D - 1))
    fishers_ND = np.pad(fishers_ND / np.linalg.norm(fishers_ND, axis=1, keepdims=True), [(0, 0), (0, 1)])
    parts = list(torch.from_numpy(fishers_ND).split([70, 50]))
    start_KD = torch.rand(K, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    start_KD[2] = torch.eye(D)[-1]
    expected = solve_diagonal([DiagonalShard(part) for part in parts], start_KD, OPTIONS)
    return Case(DiagonalFishers(OPTIONS), parts, DiagonalShard, start_KD, expected)


@pytest.mark.parametrize("make", [low_rank, diagonal])
def test_workers_that_add_their_sums_find_what_the_solver_finds(make: Any) -> None:
    case = make()
    kind, shards = case.kind, [case.shard(part) for part in case.parts]
    state, history = kind.start(shards[0], case.start_KD, Alone()), []
    while (stopped := kind.stopping_reason(state)) is None:
        state = kind.restore(state.to_arrays())
        sums = kind.unpacked(sum(kind.accumulate(shard, state).pack() for shard in shards), state)
        offered = None
        if bool(kind.dead_K(sums, state).any()):
            packed = [kind.replacements(shard, state).pack() for shard in shards]
            offered = merge_candidates([Candidates.unpack(each) for each in packed])
        state, record = kind.advance(state, sums, offered)
        for shard in shards:
            kind.settle(shard, record.accepted)
        history.append(record)
    expected = case.expected
    assert stopped == expected.stopped
    assert history[0].n_dead == expected.history[0].n_dead == 1
    for name in ("loss", "objective", "mu"):
        found, wanted = ([getattr(record, name) for record in each] for each in (history, expected.history))
        np.testing.assert_allclose(found, wanted, rtol=1e-8)

    sums = kind.unpacked(sum(kind.finish(shard, state).pack() for shard in shards), state)
    best_KD = kind.best_components(state)
    order_K, signs_K = canonical_order(best_KD, sums.ww_KK.diagonal())
    np.testing.assert_allclose(best_KD[order_K] * signs_K[:, None], expected.components_KD, atol=1e-7)
    coefficients_NK = torch.cat([shard.coefficients_NK for shard in shards])[:, order_K]
    np.testing.assert_allclose(coefficients_NK, expected.coefficients_NK, atol=1e-7)
    assert sums.loss(best_KD) + kind.penalties(sums, best_KD) == pytest.approx(expected.objective, rel=1e-8)


def test_low_rank_fishers_start_at_the_most_useful_candidates() -> None:
    options = SolverOptions(n_components=K, subsample=60)
    shard = ExampleShard(
        planted_fishers(n_examples=N, rank=3, dim=D, n_components=8, noise=0.2, seed=0).factors_NRD[:60]
    )
    kind = LowRankFishers(options)
    candidates_CD = kind.candidates(shard.factors_NRD, shard.weights_N, None)
    assert len(candidates_CD) > K
    expected = initial_state(starting_components(shard, options), options)
    np.testing.assert_array_equal(kind.start(shard, candidates_CD, Alone()).components_KD, expected.components_KD)


@pytest.mark.parametrize("wanted", [{"l1": 0.1}, {"orthogonality": 0.1}, {"n_frozen": 1}])
def test_diagonals_refuse_what_only_low_rank_fishers_have(wanted: dict[str, Any]) -> None:
    with pytest.raises(InvalidProblemError, match="need low-rank Fishers: remove them"):
        DiagonalFishers(SolverOptions(n_components=K, **wanted))
