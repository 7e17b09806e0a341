"""D-NPEFF as a scikit-learn estimator. All data stay in memory, in the calling process.

Shapes: N and M examples, P entries or groups of the diagonals, K components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import sparse
from sklearn.preprocessing import normalize
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted, check_non_negative, validate_data

from npeff.factorization.diagonals.initialization import initialize_diagonal
from npeff.factorization.diagonals.shard import DiagonalShard
from npeff.factorization.diagonals.solver import solve_diagonal
from npeff.factorization.estimator_base import Factorizer
from npeff.factorization.initialization import subsample_indices


class DiagonalNPEFF(Factorizer):
    """Non-negative factorization of diagonal per-example Fishers (D-NPEFF; Matena & Raffel, arXiv 2310.04649).

    Minimises ‖X − W H‖²_F over W ≥ 0 and H ≥ 0 with unit rows, where the rows of X are the diagonals f_i/‖f_i‖₂. The
    input is the matrix of diagonals f_i ≥ 0 of shape (N, P), dense or sparse, in float32 or float64. The passes over
    the data use the same precision.

    Args:
        n_components: K, at most N.
        max_iter: maximum number of passes over the data.
        tol: relative tolerance. The solver has converged when three steps in a row change the loss by less than this
            fraction of it.
        n_starts: number of seeded starts that are compared on the subsample. 1 skips the trial runs, which takes a
            fraction of the time.
        subsample: number of examples on which the starts are compared.
        random_state: seed or generator of the starts and the subsample.
        normalize: whether to divide each diagonal by its length. If False, the diagonals are used as given.

    Attributes:
        components_: H (K, P), non-negative unit rows, float64, by descending Σ_i W_ij².
        coefficients_: W (N, K) of the fitted data, in the precision of the data.
        loss_: loss at the solution.
        explained_: 1 − loss / ‖X‖²_F.
        history_: one IterationRecord per pass.
        n_iter_: number of passes.
        stopped_: stopping reason, "converged" or "max_iterations".
        near_duplicates_: list of (j, l, cos) for the pairs of components with cos > 0.95.
        n_features_in_: P.

    Raises:
        OptionError: from `fit`, if an option is out of its bounds.
        InvalidProblemError: from `fit`, if there are more components than examples or all diagonals are zero.
        ValueError: from `fit` and `transform`, if an array is not finite, has negative entries, or has another P than
            the fitted data.

    Examples:
        Each example is a mixture of two non-negative components that share no entry:

        >>> import numpy as np
        >>> from npeff import DiagonalNPEFF
        >>> rng = np.random.default_rng(0)
        >>> components = np.array([[0.6, 0.8, 0, 0, 0], [0, 0, 0, 0.8, 0.6]])
        >>> diagonals = rng.uniform(size=(30, 2)) @ components
        >>> model = DiagonalNPEFF(n_components=2, random_state=0)
        >>> coefficients = model.fit_transform(diagonals)
        >>> coefficients.shape, model.components_.shape
        ((30, 2), (2, 5))
        >>> bool((coefficients >= 0).all() and (model.components_ >= 0).all())
        True
        >>> round(model.explained_, 3)
        1.0
        >>> model.inverse_transform(model.transform(diagonals[:3])).shape
        (3, 5)
    """

    def __init__(
        self,
        n_components: int = 8,
        *,
        max_iter: int = 500,
        tol: float = 1e-6,
        n_starts: int = 4,
        subsample: int = 2048,
        random_state: int | np.random.RandomState | None = None,
        normalize: bool = True,
    ) -> None:
        self.n_components = n_components
        self.max_iter = max_iter
        self.tol = tol
        self.n_starts = n_starts
        self.subsample = subsample
        self.random_state = random_state
        self.normalize = normalize

    def fit(self, X: ArrayLike, y: None = None) -> DiagonalNPEFF:
        """Fit components and coefficients to diagonal Fishers.

        Args:
            X: diagonals (N, P), dense or sparse.
            y: ignored.

        Returns:
            The fitted estimator.

        Raises:
            OptionError: if an option is out of its bounds.
            InvalidProblemError: if there are more components than examples or all diagonals are zero.
            ValueError: if the array is not finite or has negative entries.
        """
        fishers_NP = self._fishers(X, reset=True)
        options = self._solver_options()
        indices = subsample_indices(fishers_NP.shape[0], options.subsample, options.seed)
        start_KP = initialize_diagonal(fishers_NP[indices], options.n_components, options.seed, options.n_starts)
        result = solve_diagonal([DiagonalShard(fishers_NP)], start_KP, options)
        self._keep(result)
        return self

    def transform(self, X: ArrayLike) -> np.ndarray:
        """Compute the optimal coefficients of examples at the fitted components.

        Args:
            X: diagonals (M, P), dense or sparse.

        Returns:
            Non-negative coefficients (M, K), in the precision of `X`.

        Raises:
            NotFittedError: if `fit` was not called.
            ValueError: if the array is not finite, has negative entries, or has another P than the fitted data.
        """
        check_is_fitted(self)
        shard = DiagonalShard(self._fishers(X, reset=False))
        shard.finish(torch.from_numpy(self.components_))
        return shard.coefficients_NK.numpy()

    def inverse_transform(self, X: ArrayLike) -> np.ndarray:
        """Compute the normalized diagonals W H that coefficients describe.

        Args:
            X: coefficients W (M, K), non-negative.

        Returns:
            Diagonals (M, P), in the precision of `X`.

        Raises:
            NotFittedError: if `fit` was not called.
            ValueError: if the coefficients are negative or not finite, or not of K components.
        """
        coefficients_MK = self._checked_coefficients(X)
        diagonals_MP: np.ndarray = coefficients_MK @ self.components_.astype(coefficients_MK.dtype)
        return diagonals_MP

    def score(self, X: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> float:
        """Compute the explained fraction of diagonals, with optimal coefficients at the fitted components.

        Args:
            X: diagonals (M, P), dense or sparse, such as those of held-out examples.
            y: ignored.
            sample_weight: weights (M,) of the examples; 1 by default.

        Returns:
            1 − loss / ‖X‖²_F, at most 1. Greater is better.

        Raises:
            NotFittedError: if `fit` was not called.
            ValueError: if an array is not finite, has negative entries, or has another P than the fitted data, or all
                diagonals are zero.
        """
        check_is_fitted(self)
        shard = DiagonalShard(self._fishers(X, reset=False))
        shard.finish(torch.from_numpy(self.components_))
        return self._explained(shard.misfits_N, shard.squares_N, X, sample_weight)

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _fishers(self, X: ArrayLike, *, reset: bool) -> Any:
        """Return the validated diagonals, normalized if `normalize` is set: an array, or a sparse matrix by rows."""
        fishers_NP = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=reset)
        check_non_negative(fishers_NP, f"{type(self).__name__} (input X)")
        if self.normalize:
            fishers_NP = normalize(fishers_NP)
        return fishers_NP if sparse.issparse(fishers_NP) else np.require(fishers_NP, requirements=["C", "W"])
