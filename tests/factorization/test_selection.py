from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from npeff.factorization import FitComparison, compare_fits, recommend, search, split_halves, stability
from npeff.factorization.selection import cluster_components, next_to_try, silhouettes


def unit_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    rows = rng.standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def shuffled(rng: np.random.Generator, components_KD: np.ndarray, noise: float) -> np.ndarray:
    """The same components in another order, with other signs, a little off."""
    rows = components_KD[rng.permutation(len(components_KD))] * rng.choice([-1, 1], (len(components_KD), 1))
    rows = rows + noise * unit_rows(rng, *rows.shape)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def row(n_components: int, explained: float, balance: float) -> FitComparison:
    return FitComparison(
        n_components=n_components,
        n_fits=9,
        explained=explained,
        explained_held_out=explained,
        explained_held_out_sd=0.0,
        cosine_seeds=0.9,
        cosine_halves=0.9,
        n_come_back=max(0.0, balance),
        balance=balance,
        silhouette_mean=0.5,
        silhouette_min=0.0,
    )


def planted_row(n_components: int, planted: int) -> FitComparison:
    """What fits of a planted problem show: each component explains as much, and those beyond are not reproduced."""
    explained = 0.9 * min(n_components, planted) / planted + 1e-4 * max(0, n_components - planted)
    n_reproduced = min(n_components, planted)
    return row(n_components, explained, 2 * n_reproduced - n_components)


def test_halves_are_disjoint_and_of_one_size() -> None:
    first, second = split_halves(11, 3)
    assert len(first) == len(second) == 5
    assert not set(first) & set(second)
    assert set(split_halves(10, 3)[0]) | set(split_halves(10, 3)[1]) == set(range(10))
    assert (split_halves(11, 4)[0] != first).any()


def test_the_balance_is_that_of_the_best_of_all_matchings() -> None:
    rng = np.random.default_rng(0)
    a_KD, b_KD, c_KD = unit_rows(rng, 3, 4, 5)
    found = compare_fits([a_KD, b_KD], [(b_KD, c_KD)], [0.5, 0.7], [0.3, 0.4])
    balances = {}
    for name, (x, y) in {"seeds": (a_KD, b_KD), "halves": (b_KD, c_KD)}.items():
        matchings = [
            [abs(float(x[i] @ y[j])) for i, j in enumerate(order)] for order in itertools.permutations(range(4))
        ]
        balances[name] = sum(2 * cosine**2 - 1 for cosine in max(matchings, key=sum))
    assert found.balance == pytest.approx(min(balances.values()))
    assert found.explained_held_out == pytest.approx(0.35)
    assert found.explained_held_out_sd == pytest.approx(np.std([0.3, 0.4], ddof=1))
    assert (found.n_components, found.n_fits) == (4, 4)


def test_components_that_all_fits_reproduce_are_all_counted() -> None:
    rng = np.random.default_rng(1)
    true_KD = unit_rows(rng, 6, 40)
    fits = [shuffled(rng, true_KD, 0.05) for _ in range(4)]
    found = compare_fits(fits[:2], [(fits[2], fits[3])], [1.0], [1.0])
    assert found.n_come_back == 6
    assert found.balance > 5.9
    assert found.silhouette_min is not None
    assert found.silhouette_min > 0.9
    half_noise = [np.vstack([fit[:3], unit_rows(rng, 3, 40)]) for fit in (true_KD, true_KD)]
    found = compare_fits([true_KD], [(half_noise[0], half_noise[1])], [1.0], [1.0])
    assert found.cosine_seeds is None
    assert found.n_come_back == 3
    assert abs(found.balance) < 1.5


def test_clusters_have_one_component_of_every_fit_and_find_them_again() -> None:
    rng = np.random.default_rng(2)
    true_KD = unit_rows(rng, 5, 30)
    fits_FKD = np.stack([shuffled(rng, true_KD, 0.3) for _ in range(7)])
    labels_FK = cluster_components(fits_FKD)
    assert (np.sort(labels_FK, axis=1) == np.arange(5)).all()
    truth_FK = np.abs(fits_FKD @ true_KD.T).argmax(axis=2)
    for cluster in range(5):
        assert len(set(truth_FK[labels_FK == cluster])) == 1


def test_silhouettes_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(3)
    fits_FKD = unit_rows(rng, 3, 4, 6)
    labels_FK = np.stack([rng.permutation(4) for _ in range(3)])
    points, labels = fits_FKD.reshape(12, 6), labels_FK.ravel()
    expected = np.zeros(4)
    for i in range(12):
        distance = [1 - abs(float(points[i] @ points[j])) for j in range(12)]
        to = {k: [distance[j] for j in range(12) if labels[j] == k and j != i] for k in range(4)}
        own = float(np.mean(to.pop(labels[i])))
        other = min(float(np.mean(values)) for values in to.values())
        expected[labels[i]] += (other - own) / max(other, own) / 3
    np.testing.assert_allclose(silhouettes(fits_FKD, labels_FK), expected)


def test_stability_is_the_mean_over_refits() -> None:
    rng = np.random.default_rng(4)
    true_KD = unit_rows(rng, 4, 50)
    lost = np.vstack([true_KD[[2, 0, 3]], unit_rows(rng, 1, 50)])
    found_K = stability(true_KD, [shuffled(rng, true_KD, 0.0), lost])
    np.testing.assert_allclose(found_K[[0, 2, 3]], 1.0)
    assert found_K[1] < 0.8


def test_a_single_component_is_no_trouble() -> None:
    a_KD = unit_rows(np.random.default_rng(5), 1, 8)
    found = compare_fits([a_KD], [(a_KD, -a_KD)], [0.2], [0.1])
    assert found.balance == pytest.approx(1.0)
    assert found.silhouette_mean is None
    assert found.explained_held_out_sd is None


@given(st.integers(2, 70), st.sampled_from([(8, 16, 24, 32, 48, 64, 80), (1, 100), (5, 10, 20, 40, 80), (30, 75, 90)]))
def test_a_search_from_any_coarse_range_ends_at_the_planted_number(planted: int, grid: tuple[int, ...]) -> None:
    asked: list[int] = []

    def gather(numbers: list[int]) -> list[FitComparison]:
        asked.extend(numbers)
        return [planted_row(n, planted) for n in numbers]

    rows, found = search(grid, gather)
    assert len(asked) == len(set(asked)) == len(rows) <= len(grid) + 16
    if planted >= grid[0]:
        assert abs(found.n_components - planted) <= max(1, planted // 32)
        assert found.sharp or planted > 64


def test_components_that_are_reproduced_but_explain_nothing_are_not_recommended() -> None:
    rows = [planted_row(k, 16) for k in (15, 16, 17, 24)] + [row(32, 0.905, 25.0)]
    found = recommend(rows)
    assert (found.n_components, found.sharp) == (16, True)


def test_components_that_explain_more_but_are_not_reproduced_are_not_recommended() -> None:
    found = recommend([row(8, 0.4, 7.0), row(16, 0.6, 11.0), row(32, 0.9, 6.0), row(64, 0.92, -20.0)])
    assert (found.n_components, found.sharp) == (16, False)
    assert "explain 0.900" in found.reason


def test_a_slow_rise_has_no_sharp_number_and_the_reason_says_so() -> None:
    rows = [row(k, 1 - np.exp(-k / 12), 0.8 * k) for k in (8, 16, 24, 32, 48, 64)]
    found = recommend(rows)
    assert 16 <= found.n_components <= 48
    assert not found.sharp
    assert "compromise" in found.reason


def test_the_largest_number_tried_is_recommended_with_advice_to_go_further() -> None:
    found = recommend([planted_row(k, 50) for k in (10, 20, 40)])
    assert (found.n_components, found.sharp) == (40, False)
    assert "try larger numbers" in found.reason


def test_a_problem_that_explains_nothing_has_an_answer() -> None:
    rows = [replace(row(k, -0.01 * k, -float(k)), n_come_back=0.0) for k in (2, 4)]
    assert recommend(rows).n_components == 2


def test_refinement_stops_next_to_small_numbers_and_near_large_ones() -> None:
    assert next_to_try([8, 16, 24], 16) == [12, 20]
    assert next_to_try([15, 16, 17], 16) == []
    assert next_to_try([8, 16], 16) == [12]
    assert next_to_try([249, 256, 264], 256) == []
    assert next_to_try([4], 4) == []
