"""The base class of the estimators: it stores the result and implements the common part of scikit-learn's interface."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, check_non_negative
from torch import Tensor

from npeff.factorization.solver import Factorization
from npeff.options.solver import SolverOptions


class Factorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]  # it has no types
    """Base class of the estimators. `fit` calls `_solver_options` first and `_keep` last."""

    n_components: int
    max_iter: int
    tol: float
    n_starts: int
    subsample: int
    random_state: int | np.random.RandomState | None

    def fit_transform(self, X: ArrayLike, y: None = None, **fit_params: Any) -> np.ndarray:
        """Fit the estimator and return the coefficients of the same examples.

        Args:
            X: the examples, as in `fit`.
            y: ignored.
            **fit_params: further arguments of `fit`.

        Returns:
            Non-negative coefficients (N, K).
        """
        coefficients_NK: np.ndarray = self.fit(X, y, **fit_params).coefficients_
        return coefficients_NK

    def _checked_coefficients(self, X: ArrayLike) -> np.ndarray:
        """Return the coefficients (M, K) that are given to `inverse_transform`, in float64 or float32."""
        check_is_fitted(self)
        checked: np.ndarray = check_array(X, dtype=[np.float64, np.float32])
        check_non_negative(checked, f"{type(self).__name__}.inverse_transform")
        if checked.shape[1] != len(self.components_):
            raise ValueError(f"the coefficients must be of {len(self.components_)} components, not {checked.shape[1]}")
        return checked

    @staticmethod
    def _explained(misfits_N: Tensor, squares_N: Tensor, X: ArrayLike, sample_weight: ArrayLike | None) -> float:
        """Return the explained fraction of the squared norms of the examples, weighted."""
        weights_N = torch.ones_like(squares_N)
        if sample_weight is not None:
            weights_N = torch.from_numpy(_check_sample_weight(sample_weight, X, dtype=np.float64))
        total = float(weights_N @ squares_N)
        if total == 0:
            raise ValueError("no fraction of Fishers that are all zero can be explained")
        return 1.0 - float(weights_N @ misfits_N) / total

    def _solver_options(self, **more: Any) -> SolverOptions:
        """Return the solver options that both estimators have, with a seed drawn from `random_state`, and ``more``."""
        return SolverOptions(
            n_components=self.n_components,
            max_iterations=self.max_iter,
            tolerance=self.tol,
            n_starts=self.n_starts,
            subsample=self.subsample,
            seed=int(check_random_state(self.random_state).randint(2**31 - 1)),
            **more,
        )

    def _keep(self, result: Factorization) -> None:
        self.components_ = result.components_KD.numpy()
        self.coefficients_ = result.coefficients_NK.numpy()
        self.loss_ = result.loss
        self.explained_ = result.explained
        self.history_ = result.history
        self.n_iter_ = result.n_iter
        self.stopped_ = result.stopped
        self.near_duplicates_ = result.near_duplicates

    @property
    def _n_features_out(self) -> int:
        return len(self.components_)
