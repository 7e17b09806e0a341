"""Removals of several directions: the part in their span, and the search for an adversarial subset."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from npeff.models.predictions import kl_divergence
from npeff.verification.joint_ablation import (
    MOST_EVALUATIONS,
    PredictedRemovals,
    Span,
    adversarial_subset,
    random_subsets,
)
from npeff.verification.linearized import Linearized
from numpy.typing import NDArray
from torch import from_numpy

L, P, N, C = 6, 40, 9, 4

rng = np.random.default_rng(0)
DIRECTIONS_LP = rng.standard_normal((L, P)) + rng.standard_normal(P)  # with much in common
DIRECTIONS_LP /= np.linalg.norm(DIRECTIONS_LP, axis=1, keepdims=True)
THETA_P = rng.standard_normal(P)


def span(directions_LP: NDArray[np.float64] = DIRECTIONS_LP) -> Span:
    return Span(directions_LP @ directions_LP.T, directions_LP @ THETA_P)


def removed(*places: int) -> NDArray[np.bool_]:
    return np.isin(np.arange(L), places)


@pytest.mark.parametrize("places", [(), (2,), (0, 3), tuple(range(L))])
def test_the_removed_part_is_the_projection_on_the_span(places: tuple[int, ...]) -> None:
    basis_PS = np.linalg.qr(DIRECTIONS_LP[list(places)].T)[0]
    part_P = basis_PS @ basis_PS.T @ THETA_P
    coefficients_L = span().coefficients(removed(*places))
    np.testing.assert_allclose(coefficients_L @ DIRECTIONS_LP, part_P, atol=1e-12)
    assert span().length(coefficients_L) == pytest.approx(float(np.linalg.norm(part_P)))
    other_P = np.random.default_rng(1).standard_normal(P)
    other_P /= np.linalg.norm(other_P)
    overlap = span().overlap(removed(*places), DIRECTIONS_LP @ other_P)
    assert overlap == pytest.approx(float(np.linalg.norm(basis_PS.T @ other_P)))


def test_one_direction_is_removed_by_its_displacement() -> None:
    for place in range(L):
        coefficients_L = span().coefficients(removed(place))
        np.testing.assert_allclose(coefficients_L, np.where(removed(place), DIRECTIONS_LP @ THETA_P, 0))


def test_directions_that_are_equal_but_for_rounding_are_removed_as_one() -> None:
    twice_LP = DIRECTIONS_LP.copy()
    twice_LP[1] = twice_LP[0].astype(np.float16)
    both, first = (span(twice_LP).coefficients(removed(*places)) @ twice_LP for places in ((0, 1), (0,)))
    np.testing.assert_allclose(both, first, atol=3e-3)
    zero_LP = np.concatenate([np.zeros((1, P)), DIRECTIONS_LP[1:]])
    assert not span(zero_LP).coefficients(removed(0)).any()


def test_draws_are_those_of_the_seed_and_more_draws_go_on() -> None:
    drawn = random_subsets(L, 400, seed=3)
    np.testing.assert_array_equal(random_subsets(L, 20, seed=3), drawn[:20])
    assert (random_subsets(L, 20, seed=4) != drawn[:20]).any()
    assert drawn.mean(axis=0) == pytest.approx(np.full(L, 0.5), abs=0.1)


def predicted() -> PredictedRemovals:
    rng = np.random.default_rng(2)
    jacobians_NCP = rng.standard_normal((N, C, P))
    logits_NC, own_P = rng.standard_normal((N, C)), rng.standard_normal(P)
    own = Linearized(np.zeros(N), logits_NC, jacobians_NCP @ own_P)
    changes_LNC = np.einsum("ncp,lp->lnc", jacobians_NCP, DIRECTIONS_LP)
    return PredictedRemovals(span(), changes_LNC, own, 0.1, 4, np.array([1, 3, 1, 1, 2]))


def test_the_predicted_ratio_is_that_of_a_linear_model() -> None:
    found = predicted()
    assert found.own.logits_nC is not None
    assert found.own.changes_nC is not None
    subset = removed(1, 2, 5)
    part_L = np.linalg.lstsq(DIRECTIONS_LP[subset].T, THETA_P, rcond=None)[0]
    before_NC = found.own.logits_nC - np.einsum("l,lnc->nc", part_L, found.changes_LnC[subset])
    kl_N = kl_divergence(from_numpy(before_NC + 0.1 * found.own.changes_nC), from_numpy(before_NC)).numpy()
    expected = kl_N[:4].mean() / (kl_N[4:] @ found.counts_m / found.counts_m.sum())
    assert found.kl_ratio(subset) == pytest.approx(expected)


def test_the_adversarial_subset_is_no_better_than_its_starts_and_its_neighbours() -> None:
    found = predicted()
    everything = [np.array(subset) for subset in itertools.product([False, True], repeat=L)]
    for seed in range(5):
        starts = [np.zeros(L, bool), *random_subsets(L, 3, seed)]
        worst = adversarial_subset(found.kl_ratio, starts, seed)
        least = found.kl_ratio(worst)
        assert all(least <= found.kl_ratio(start) for start in starts)
        assert all(least <= found.kl_ratio(worst ^ removed(place)) for place in range(L))
        assert least >= min(found.kl_ratio(subset) for subset in everything)
    assert min(found.kl_ratio(subset) for subset in everything) < found.kl_ratio(removed())


def test_the_search_ends_and_takes_what_is_not_known_for_the_best() -> None:
    asked = []

    def ratio(subset: NDArray[np.bool_]) -> float:
        asked.append(subset)
        return math.nan if subset.sum() % 2 else -float(len(asked))

    n_others = 3 * MOST_EVALUATIONS
    worst = adversarial_subset(ratio, [np.zeros(n_others, bool)], seed=0)
    assert len(asked) == 1 + MOST_EVALUATIONS
    assert not worst.any()
