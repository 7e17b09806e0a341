"""NPEFF as a scikit-learn estimator. All data stay in memory, in the calling process.

Shapes: N and M examples, R rank of the Fisher factors, D sketch or parameters, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils import Tags, check_array
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from npeff.factorization.estimator_base import Factorizer
from npeff.factorization.example_shard import ExampleShard
from npeff.factorization.initialization import starting_components
from npeff.factorization.solver import IterationRecord, solve


class NPEFF(Factorizer):
    """Non-negative per-example Fisher factorization (Matena & Raffel, arXiv 2310.04649).

    Minimises Σ_i ‖Â_iᵀ Â_i − Σ_j W_ij h_j h_jᵀ‖²_F over W ≥ 0 and unit h_j, where Â_i = A_i/√‖A_iᵀ A_i‖_F. The input
    is the array of Fisher factors A of shape (N, R, D), in float32 or float64. The passes over the data use the same
    precision. An array of shape (N, D) contains factors of rank 1.

    Args:
        n_components: K, at most N·R.
        max_iter: maximum number of passes over the data.
        tol: relative tolerance. The solver has converged when three steps in a row change the objective by less than
            this fraction of it.
        n_starts: number of seeded starts that are compared on the subsample.
        subsample: number of examples on which the starts are compared.
        random_state: seed or generator of the starts and the subsample.
        normalize: whether to divide each factor by the square root of the Frobenius norm of its Fisher. If False, the
            factors are used as given.
        l1: λ in [0, 1) of the penalty 2 λ Σ_i ‖F̂_i‖ Σ_j W_ij. With one component, the coefficient is
            max(0, T_ij − λ ‖F̂_i‖), where T_ij = ‖Â_i h_j‖².
        orthogonality: γ of the penalty γ Σ_i ‖F̂_i‖² times the mean squared cosine of two components.
        frozen_components: (K0, D), K0 < K. The first K0 components are fixed to these rows, scaled to unit length.
        start_components: (K, D) components to start from, instead of seeded starts.
        callbacks: functions that are called with the IterationRecord of each pass.

    Attributes:
        components_: (K, D) unit rows, float64. The frozen components come first, then the others by descending
            Σ_i W_ij². The entry of largest magnitude in each row that is not frozen is positive.
        coefficients_: W (N, K) of the fitted data, in the precision of the data.
        loss_: loss at the solution, without penalties.
        objective_: loss at the solution plus the penalties.
        explained_: 1 − loss / Σ_i ‖F̂_i‖².
        history_: one IterationRecord per pass.
        n_iter_: number of passes.
        stopped_: stopping reason, "converged", "max_iterations" or "stalled".
        near_duplicates_: list of (j, l, cos) for the pairs of components with |cos| > 0.95.
        n_features_in_: D.

    Raises:
        OptionError: from `fit`, if an option is out of its bounds.
        InvalidProblemError: from `fit`, if there are more components than factor rows or all factors are zero.
        ValueError: from `fit` and `transform`, if an array is not finite, or has the wrong number of axes or another D
            than the fitted data.

    Examples:
        Three orthonormal directions that all 50 examples share are recovered exactly:

        >>> import numpy as np
        >>> from npeff import NPEFF
        >>> rng = np.random.default_rng(0)
        >>> directions = np.linalg.qr(rng.standard_normal((12, 3))).Q.T
        >>> factors = rng.uniform(size=(50, 3, 1)) * directions
        >>> factors.shape
        (50, 3, 12)
        >>> model = NPEFF(n_components=3, random_state=0)
        >>> coefficients = model.fit_transform(factors)
        >>> coefficients.shape, model.components_.shape
        ((50, 3), (3, 12))
        >>> round(model.explained_, 3)
        1.0
        >>> bool(np.allclose(np.abs(model.components_ @ directions.T).max(axis=1), 1, atol=1e-2))
        True

        The coefficients of new examples at the fitted components:

        >>> model.transform(rng.standard_normal((5, 3, 12))).shape
        (5, 3)
    """

    def __init__(
        self,
        n_components: int = 8,
        *,
        max_iter: int = 100,
        tol: float = 1e-6,
        n_starts: int = 4,
        subsample: int = 2048,
        random_state: int | np.random.RandomState | None = None,
        normalize: bool = True,
        l1: float = 0.0,
        orthogonality: float = 0.0,
        frozen_components: ArrayLike | None = None,
        start_components: ArrayLike | None = None,
        callbacks: Sequence[Callable[[IterationRecord], object]] = (),
    ) -> None:
        self.n_components = n_components
        self.max_iter = max_iter
        self.tol = tol
        self.n_starts = n_starts
        self.subsample = subsample
        self.random_state = random_state
        self.normalize = normalize
        self.l1 = l1
        self.orthogonality = orthogonality
        self.frozen_components = frozen_components
        self.start_components = start_components
        self.callbacks = callbacks

    def fit(self, X: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> NPEFF:
        """Fit components and coefficients to Fisher factors.

        Args:
            X: factors (N, R, D), or (N, D) for rank 1.
            y: ignored.
            sample_weight: weights (N,) of the examples in the loss; 1 by default.

        Returns:
            The fitted estimator.

        Raises:
            OptionError: if an option is out of its bounds.
            InvalidProblemError: if there are more components than factor rows or all factors are zero.
            ValueError: if an array is not finite or has the wrong shape.
        """
        shard = self._shard(X, reset=True)
        if sample_weight is not None:
            weights_N = _check_sample_weight(sample_weight, X, dtype=np.float64)
            shard = ExampleShard(shard.factors_NRD, weights_N=weights_N)
        frozen_KD = self._given_components(self.frozen_components, shard.dim)
        options = self._solver_options(l1=self.l1, orthogonality=self.orthogonality, n_frozen=len(frozen_KD))
        start_KD = self._given_components(self.start_components, shard.dim)
        if self.start_components is None:
            start_KD = starting_components(shard, options, frozen_KD)
        start_KD[: len(frozen_KD)] = frozen_KD
        result = solve([shard], start_KD, options, lambda _, record: [call(record) for call in self.callbacks])
        self._keep(result)
        self.objective_ = result.objective
        return self

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Compute the optimal coefficients of examples at the fitted components.

        Args:
            X: factors (M, R, D), or (M, D) for rank 1.

        Returns:
            Non-negative coefficients (M, K), in the precision of `X`.

        Raises:
            NotFittedError: if `fit` was not called.
            ValueError: if the array is not finite or has another D than the fitted data.
        """
        check_is_fitted(self)
        shard = self._shard(X, reset=False)
        shard.finish(torch.from_numpy(self.components_), l1=self.l1)
        return shard.coefficients_NK.numpy()

    def inverse_transform(self, X: ArrayLike) -> np.ndarray:
        """Compute the Fisher factors that coefficients describe.

        The Fisher Σ_j W_ij h_j h_jᵀ of an example is returned as the K rows √W_ij h_j. `transform` of these factors
        gives the coefficients divided by the Frobenius norm of this Fisher, or the coefficients if `normalize` is
        False.

        Args:
            X: coefficients W (M, K), non-negative.

        Returns:
            Factors (M, K, D), in the precision of `X`.

        Raises:
            NotFittedError: if `fit` was not called.
            ValueError: if the coefficients are negative or not finite, or not of K components.
        """
        coefficients_MK = self._checked_coefficients(X)
        factors_MKD: np.ndarray = np.sqrt(coefficients_MK)[:, :, None] * self.components_.astype(coefficients_MK.dtype)
        return factors_MKD

    def score(self, X: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> float:
        """Compute the explained fraction of Fishers, with optimal coefficients at the fitted components.

        Args:
            X: factors (M, R, D), or (M, D) for rank 1, such as those of held-out examples.
            y: ignored.
            sample_weight: weights (M,) of the examples; 1 by default.

        Returns:
            1 − loss / Σ_i ‖F̂_i‖², at most 1. Greater is better.

        Raises:
            NotFittedError: if `fit` was not called.
            ValueError: if an array is not finite or has another D than the fitted data, or all factors are zero.
        """
        check_is_fitted(self)
        shard = self._shard(X, reset=False)
        shard.finish(torch.from_numpy(self.components_), l1=self.l1)
        return self._explained(shard.misfits_N, shard.fisher_squares_N, X, sample_weight)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @staticmethod
    def _given_components(components: ArrayLike | None, dim: int) -> Tensor:
        if components is None:
            return torch.zeros(0, dim, dtype=torch.float64)
        checked = torch.from_numpy(check_array(components, dtype=np.float64, copy=True))
        if checked.shape[1] != dim:
            raise ValueError(f"frozen_components and start_components must have {dim} features, not {checked.shape[1]}")
        return torch.nn.functional.normalize(checked, dim=1)

    def _shard(self, X: ArrayLike, *, reset: bool) -> ExampleShard:
        if np.asarray(X).ndim == 3:
            factors_NRD = check_array(X, dtype=[np.float64, np.float32], allow_nd=True)
            # scikit-learn takes D from the last axis of a matrix: here the matrix of all factor rows.
            validate_data(self, factors_NRD.reshape(-1, factors_NRD.shape[2]), reset=reset, skip_check_array=True)
        else:
            factors_NRD = validate_data(self, X, dtype=[np.float64, np.float32], reset=reset)[:, None, :]
        factors = torch.from_numpy(np.require(factors_NRD, requirements=["C", "W"]))
        shard = ExampleShard(factors)
        if not self.normalize:
            return shard
        # ‖AᵀA‖_F is the square root of `fisher_squares_N`. A Fisher that is zero stays zero.
        norms_N = shard.fisher_squares_N.sqrt()
        scale_N = torch.where(norms_N > 0, norms_N, 1.0).rsqrt().to(factors)
        return ExampleShard(factors * scale_N[:, None, None])
