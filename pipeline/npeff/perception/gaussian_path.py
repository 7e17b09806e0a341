"""Fisher information along a path of Gaussian feature vectors, such as the responses of filters to two textures.

The covariances follow the geodesic of the Wasserstein distance: Σ_t = Q_t Q_tᵀ with Q_t = t √B + (1 − t) Q₀ and
Q₀ = B^{-½} (B^{½} A B^{½})^{½}, so that Q₀ Q₀ᵀ = A. The information about t of N(μ_t, Σ_t) is
μ′ᵀ Σ⁻¹ μ′ + ½ tr(Σ⁻¹ Σ′ Σ⁻¹ Σ′).

Source: Vacher & Mamassian 2024, with Σ_t′ = Q′Qᵀ + QQ′ᵀ.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


class GaussianPath:
    """The path from N(start_mean, start_covariance) to N(end_mean, end_covariance).

    Args:
        start_mean: Mean at t = 0, (d,).
        start_covariance: Covariance A at t = 0, (d, d), positive definite.
        end_mean: Mean at t = 1, (d,).
        end_covariance: Covariance B at t = 1, (d, d), positive definite.

    Raises:
        ValueError: The shapes do not fit, or a covariance is not symmetric and positive definite.
    """

    def __init__(
        self, start_mean: ArrayLike, start_covariance: ArrayLike, end_mean: ArrayLike, end_covariance: ArrayLike
    ) -> None:
        a_dd, b_dd = _covariance("start", start_covariance), _covariance("end", end_covariance)
        self._means = np.asarray(start_mean, np.float64), np.asarray(end_mean, np.float64)
        if not a_dd.shape == b_dd.shape == (*self._means[0].shape, len(a_dd)) == (*self._means[1].shape, len(a_dd)):
            raise ValueError("the means and the covariances have different numbers of features")
        root_dd = _power(b_dd, 0.5)
        self._start_dd = _power(b_dd, -0.5) @ _power(root_dd @ a_dd @ root_dd, 0.5)
        self._change_dd = root_dd - self._start_dd

    def mean(self, t: float) -> NDArray[np.float64]:
        """Return the mean (d,) at t."""
        return t * self._means[1] + (1 - t) * self._means[0]

    def covariance(self, t: float) -> NDArray[np.float64]:
        """Return the covariance (d, d) at t."""
        factor_dd = self._start_dd + t * self._change_dd
        return factor_dd @ factor_dd.T

    def information(self, t: ArrayLike) -> NDArray[np.float64]:
        """Compute the Fisher information about t.

        Args:
            t: Positions on the path, of any shape.
        """
        positions = np.asarray(t, np.float64)
        return np.array([self._information(each) for each in positions.ravel()]).reshape(positions.shape)

    def _information(self, t: float) -> float:
        factor_dd = self._start_dd + t * self._change_dd
        half_dd = self._change_dd @ factor_dd.T
        change_d = self._means[1] - self._means[0]
        solved = np.linalg.solve(factor_dd @ factor_dd.T, np.column_stack([half_dd + half_dd.T, change_d]))
        product_dd = solved[:, :-1]
        return float(change_d @ solved[:, -1] + np.sum(product_dd * product_dd.T) / 2)


def rao_distance(start_covariance: ArrayLike, end_covariance: ArrayLike) -> float:
    """Compute the Fisher-Rao distance of two Gaussians with the same mean: √(½ Σ log² λ).

    λ are the eigenvalues of A⁻¹B. No path between the two is shorter.

    Args:
        start_covariance: Covariance A, (d, d), positive definite.
        end_covariance: Covariance B, (d, d), positive definite.
    """
    root_dd = _power(_covariance("start", start_covariance), -0.5)
    values_d = np.linalg.eigvalsh(root_dd @ _covariance("end", end_covariance) @ root_dd)
    return float(np.sqrt(np.sum(np.log(values_d) ** 2) / 2))


def _covariance(name: str, value: ArrayLike) -> NDArray[np.float64]:
    covariance_dd = np.asarray(value, np.float64)
    square = covariance_dd.ndim == 2 and covariance_dd.shape[0] == covariance_dd.shape[1]
    if not (square and np.isfinite(covariance_dd).all() and np.allclose(covariance_dd, covariance_dd.T)):
        raise ValueError(f"the {name} covariance must be a symmetric matrix of finite numbers")
    if np.linalg.eigvalsh(covariance_dd)[0] <= 0:
        raise ValueError(f"the {name} covariance is not positive definite: add a small multiple of the identity")
    return covariance_dd


def _power(matrix_dd: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    values_d, vectors_dd = np.linalg.eigh(matrix_dd)
    power: NDArray[np.float64] = (vectors_dd * values_d**exponent) @ vectors_dd.T
    return power
