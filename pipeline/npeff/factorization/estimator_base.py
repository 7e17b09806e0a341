"""What the estimators share: keeping a result, and the parts of scikit-learn's contract that follow from it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin

from npeff.factorization.solver import Factorization


class Factorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """An estimator whose `fit` ends in `_keep`."""

    def fit_transform(self, X: ArrayLike, y: None = None, **fit_params: Any) -> np.ndarray:
        """Fit, and return the coefficients (N, K) of the same examples."""
        coefficients_NK: np.ndarray = self.fit(X, y, **fit_params).coefficients_
        return coefficients_NK

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
