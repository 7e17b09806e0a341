"""Components that are not fitted by the iterations of the solver: clusters, eigenvectors, and random vectors.

SciPy and scikit-learn are imported by the functions that need them, because other kinds do not.

Shapes: N examples, D sketch, K components.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.factorization.factor_source import FactorSource
from npeff.factorization.problem import InvalidProblemError

_DENSE = 512
"""Largest dimension for which the matrix of the eigenvectors is formed."""


@dataclass(frozen=True)
class Clusters:
    """The result of `cluster`."""

    centres_KD: NDArray[np.float64]
    """Means of the rows of each cluster."""
    n_iter: int
    converged: bool

    def nearest(self, rows_ND: NDArray[np.floating]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the nearest centre (N,) of each row, and the squared distance (N,) to it."""
        rows_ND = rows_ND.astype(np.float64, copy=False)
        products_NK = rows_ND @ self.centres_KD.T
        squares_NK = np.square(self.centres_KD).sum(1) - 2 * products_NK
        nearest_N: NDArray[np.int64] = squares_NK.argmin(1)
        distances_N = np.square(rows_ND).sum(1) + np.take_along_axis(squares_NK, nearest_N[:, None], 1)[:, 0]
        return nearest_N, distances_N.clip(0)

    def coefficients(self, rows_ND: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return max(0, cos) (N, K) of each row with its nearest centre, and 0 for the other centres."""
        nearest_N, _ = self.nearest(rows_ND)
        lengths_N = np.linalg.norm(rows_ND, axis=1)
        products_N = np.einsum("nd,nd->n", rows_ND, self.components_KD[nearest_N])
        cosines_N = np.divide(products_N, lengths_N, out=np.zeros_like(products_N), where=lengths_N > 0)
        found_NK = np.zeros((len(rows_ND), len(self.centres_KD)), np.float32)
        found_NK[np.arange(len(rows_ND)), nearest_N] = cosines_N.clip(0)
        return found_NK

    @property
    def components_KD(self) -> NDArray[np.float64]:
        """The centres as unit vectors."""
        lengths_K1 = np.linalg.norm(self.centres_KD, axis=1, keepdims=True)
        result: NDArray[np.float64] = np.divide(
            self.centres_KD, lengths_K1, out=np.zeros_like(self.centres_KD), where=lengths_K1 > 0
        )
        return result


def cluster(
    rows_ND: NDArray[np.floating], n_clusters: int, seed: int, *, n_starts: int, max_iterations: int, tolerance: float
) -> Clusters:
    """Compute k-means clusters of rows, the best of several starts (scikit-learn, Lloyd's algorithm).

    Args:
        rows_ND: Rows. They are in memory; scikit-learn makes one copy.
        n_clusters: K.
        seed: Seed of the starts.
        n_starts: Number of k-means++ starts.
        max_iterations: Largest number of iterations of a start.
        tolerance: Squared movement of the centres at which a start has converged, relative to the variance of the rows.

    Raises:
        InvalidProblemError: There are fewer rows than clusters.
    """
    if len(rows_ND) < n_clusters:
        raise InvalidProblemError(
            f"n_components={n_clusters} exceeds the {len(rows_ND)} examples with a nonzero gradient: reduce "
            "n_components or give more examples"
        )
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    state = int(np.random.SeedSequence(seed).generate_state(1)[0])
    model = KMeans(n_clusters, n_init=n_starts, max_iter=max_iterations, tol=tolerance, random_state=state)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct rows than clusters: some clusters are empty
        model.fit(rows_ND)
    return Clusters(model.cluster_centers_.astype(np.float64), int(model.n_iter_), model.n_iter_ < max_iterations)


def leading_eigenvectors(source: FactorSource, n_components: int, seed: int) -> NDArray[np.float64]:
    """Compute the eigenvectors (K, D) of Σ_i Â_iᵀÂ_i with the largest eigenvalues, largest first.

    They are the leading right singular vectors of all factor rows, which are not centred. For a large D, the Lanczos
    iteration of ARPACK reads the factors once for each product, a few times K in all.

    Args:
        source: The factors.
        n_components: K.
        seed: Seed of the first vector of the iteration.

    Raises:
        InvalidProblemError: K is larger than D.
    """
    dim = source.dim
    if n_components > dim:
        raise InvalidProblemError(
            f"n_components={n_components} exceeds the {dim} coordinates of the sketch: reduce n_components"
        )

    def product(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        given = torch.as_tensor(vectors, device=source.device)
        total = torch.zeros_like(given)
        for block_NRD in source.blocks():
            rows = block_NRD.flatten(0, 1).double()
            total += rows.T @ (rows @ given)
        return total.cpu().numpy()

    if dim <= max(_DENSE, 2 * n_components):
        vectors_DK = np.linalg.eigh(product(np.eye(dim)))[1][:, -n_components:]
    else:
        from scipy.sparse.linalg import LinearOperator, eigsh

        start_D = np.random.default_rng(seed).standard_normal(dim)
        operator = LinearOperator((dim, dim), matvec=lambda vector: product(vector.reshape(dim)), dtype=np.float64)
        _, vectors_DK = eigsh(operator, k=n_components, which="LA", v0=start_D)
    return np.ascontiguousarray(vectors_DK.T[::-1])


def random_components(n_components: int, dim: int, seed: int) -> NDArray[np.float64]:
    """Draw Gaussian vectors (K, D) of unit length."""
    drawn_KD = np.random.default_rng([seed, n_components, dim]).standard_normal((n_components, dim))
    unit_KD: NDArray[np.float64] = drawn_KD / np.linalg.norm(drawn_KD, axis=1, keepdims=True)
    return unit_KD
