"""The kinds besides ``fishers`` and diagonals, against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from npeff.factorization import (
    DiagonalShard,
    FactorsInMemory,
    InvalidProblemError,
    SolverOptions,
    initialize_diagonal,
    solve_diagonal,
)
from npeff.factorization.direct import cluster, leading_eigenvectors, random_components
from npeff.factorization.evidence_scores import evidence_scores
from npeff.factorization.rows import folded, squared_entries, unfolded
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF

OPTIONS = {"n_starts": 4, "max_iterations": 100, "tolerance": 1e-6}


def blobs(n_clusters: int = 4, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels = rng.integers(n_clusters, size=300)
    rows = rng.standard_normal((n_clusters, 12))[labels] + noise * rng.standard_normal((300, 12))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def test_clusters_of_separate_groups_are_the_groups() -> None:
    rows, labels = blobs()
    found = cluster(rows, 4, 0, **OPTIONS)
    nearest, distances = found.nearest(rows)
    assert len(set(zip(nearest.tolist(), labels.tolist(), strict=True))) == 4
    model = KMeans(4, n_init=4, random_state=1).fit(rows)
    assert len(set(zip(nearest.tolist(), model.labels_.tolist(), strict=True))) == 4
    assert distances.sum() == pytest.approx(model.inertia_, rel=1e-9)
    for centre, chosen in enumerate(found.centres_KD):
        np.testing.assert_allclose(chosen, rows[nearest == centre].mean(0), atol=1e-12)


def test_the_objective_of_clusters_falls_with_iterations_and_with_clusters() -> None:
    rows, _ = blobs(noise=1.0)
    losses = [
        cluster(rows, 6, 0, n_starts=1, max_iterations=n, tolerance=0.0).nearest(rows)[1].sum() for n in (1, 2, 4, 50)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert (
        cluster(rows, 12, 0, **OPTIONS).nearest(rows)[1].sum() < cluster(rows, 3, 0, **OPTIONS).nearest(rows)[1].sum()
    )


def test_a_coefficient_of_a_cluster_is_the_cosine_with_the_own_centre() -> None:
    rows, _ = blobs(noise=0.5)
    found = cluster(rows, 4, 0, **OPTIONS)
    coefficients = found.coefficients(2.0 * rows)
    nearest, _ = found.nearest(2.0 * rows)
    cosines = rows @ (found.centres_KD / np.linalg.norm(found.centres_KD, axis=1, keepdims=True)).T
    expected = np.where(np.arange(4) == nearest[:, None], np.maximum(0, cosines), 0)
    np.testing.assert_allclose(coefficients, expected, atol=1e-6)
    assert not found.coefficients(np.zeros((1, 12))).any()


def test_too_few_gradients_for_the_clusters_are_refused() -> None:
    with pytest.raises(InvalidProblemError, match="exceeds the 2 examples with a nonzero gradient"):
        cluster(np.eye(2, 5), 3, 0, **OPTIONS)


@pytest.mark.parametrize("dim", [40, 700])  # by the matrix, and by products only
def test_leading_eigenvectors_are_the_right_singular_vectors_of_all_rows(dim: int) -> None:
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((50, 3, dim)) * np.linspace(1, 4, dim)
    source = FactorsInMemory([torch.from_numpy(part) for part in np.array_split(factors, 3)])
    found = leading_eigenvectors(source, 5, seed=0)
    expected = np.linalg.svd(factors.reshape(-1, dim), full_matrices=False)[2][:5]
    np.testing.assert_allclose(np.abs(np.einsum("kd,kd->k", found, expected)), 1, atol=1e-9)
    np.testing.assert_array_equal(found, leading_eigenvectors(source, 5, seed=0))
    with pytest.raises(InvalidProblemError, match=f"exceeds the {dim} coordinates"):
        leading_eigenvectors(source, dim + 1, seed=0)


def test_random_components_are_unit_vectors_of_their_seed() -> None:
    one, other = random_components(6, 50, 1), random_components(6, 50, 2)
    np.testing.assert_allclose(np.linalg.norm(one, axis=1), 1)
    np.testing.assert_array_equal(one, random_components(6, 50, 1))
    assert np.abs(one @ other.T).max() < 0.9


def test_folded_rows_are_non_negative_and_unfold_to_the_rows() -> None:
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert (folded(rows) >= 0).all()
    unit, lengths = unfolded(folded(rows))
    torch.testing.assert_close(unit * lengths[:, None], rows)
    same_halves = torch.ones(1, 6, dtype=torch.float64)
    unit, lengths = unfolded(same_halves)
    assert not unit.any()
    assert not lengths.any()


def test_squared_entries_are_the_diagonal_of_the_fisher() -> None:
    factors = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fishers = factors.mT @ factors
    torch.testing.assert_close(squared_entries(factors), fishers.diagonal(dim1=1, dim2=2))


@pytest.mark.parametrize("rows", ["gradients", "squared"])
def test_the_factorization_of_rows_falls_monotonically_to_a_loss_like_that_of_scikit_learn(rows: str) -> None:
    rng = np.random.default_rng(5)
    directions = rng.standard_normal((4, 20))
    mixed = (rng.random((120, 4)) * (rng.random((120, 4)) < 0.5)) @ directions + 0.1 * rng.standard_normal((120, 20))
    if rows == "gradients":
        x = folded(torch.nn.functional.normalize(torch.from_numpy(mixed), dim=1))
    else:
        x = squared_entries(torch.from_numpy(mixed[:, None] / np.linalg.norm(mixed, axis=1)[:, None, None]))
    options = SolverOptions(n_components=4, max_iterations=200, seed=0)
    found = solve_diagonal([DiagonalShard(x)], initialize_diagonal(x, 4, seed=0), options)
    accepted = [row.loss for row in found.history if row.accepted]
    assert (np.diff(accepted) <= 1e-9 * accepted[0]).all()
    model = NMF(4, init="nndsvda", max_iter=2000, tol=1e-7, random_state=0)
    expected = np.square(x.numpy() - model.fit_transform(x.numpy()) @ model.components_).sum()
    assert found.loss < 1.02 * expected


def test_evidence_is_the_quadratic_form_of_the_normalized_fisher() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(9, 3, 11, generator=generator)
    directions = torch.nn.functional.normalize(torch.randn(4, 11, generator=generator, dtype=torch.float64), dim=1)
    fishers = factors.double().mT @ factors.double()
    expected = torch.einsum("kd,nde,ke->nk", directions, fishers, directions)
    torch.testing.assert_close(evidence_scores(factors, directions), expected)
