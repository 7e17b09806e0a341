"""D-NPEFF as a scikit-learn estimator: everything in memory, in this process.

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

    Minimises ‖X − W H‖²_F over W ≥ 0 and H ≥ 0 with unit rows, where the rows of X are the diagonals f_i/‖f_i‖₂. Input
    is the diagonals f_i ≥ 0 of shape (N, P), dense or sparse, float32 or float64, which is also the precision of the
    passes over them.

    Args:
        n_components: K, at most N.
        max_iter: most passes over the data.
        tol: converged when three steps in a row change the loss by less than this fraction of it.
        n_starts: seeded starts tried on the subsample; a single one is taken untried, in a fraction of the time.
        subsample: examples that starts are tried on.
        random_state: seed or generator of the starts and the subsample.
        normalize: whether to divide each diagonal by its length. False takes them as given.

    Attributes:
        components_: H (K, P), non-negative unit rows, float64, by descending Σ_i W_ij².
        coefficients_: W (N, K) of the data fitted, in its precision.
        loss_: the minimum found.
        explained_: 1 − loss / ‖X‖²_F.
        history_: one IterationRecord per pass.
        n_iter_: number of passes.
        stopped_: "converged" or "max_iterations".
        near_duplicates_: (j, l, cos) of components with cos > 0.95.
        n_features_in_: P.

    Raises:
        OptionError: from `fit`, for an option that is out of its bounds.
        InvalidProblemError: from `fit`, for more components than examples or diagonals that are all zero.
        ValueError: for arrays that are not finite, have negative entries, or another P than was fitted.
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
        """Fit components and coefficients to diagonals (N, P)."""
        fishers_NP = self._fishers(X, reset=True)
        options = self._solver_options()
        indices = subsample_indices(fishers_NP.shape[0], options.subsample, options.seed)
        start_KP = initialize_diagonal(fishers_NP[indices], options.n_components, options.seed, options.n_starts)
        result = solve_diagonal([DiagonalShard(fishers_NP)], start_KP, options)
        self._keep(result)
        return self

    def transform(self, X: ArrayLike) -> np.ndarray:
        """The optimal coefficients (M, K) of new examples' diagonals (M, P) at the fitted components."""
        check_is_fitted(self)
        shard = DiagonalShard(self._fishers(X, reset=False))
        shard.finish(torch.from_numpy(self.components_))
        return shard.coefficients_NK.numpy()

    def inverse_transform(self, X: ArrayLike) -> np.ndarray:
        """The normalised diagonals (M, P) that coefficients (M, K) stand for."""
        check_is_fitted(self)
        result: np.ndarray = np.asarray(X) @ self.components_
        return result

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = True
        tags.input_tags.sparse = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _fishers(self, X: ArrayLike, *, reset: bool) -> Any:
        """The checked diagonals, normalised: an array, or a sparse matrix by rows."""
        fishers_NP = validate_data(self, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=reset)
        check_non_negative(fishers_NP, f"{type(self).__name__} (input X)")
        if self.normalize:
            fishers_NP = normalize(fishers_NP)
        return fishers_NP if sparse.issparse(fishers_NP) else np.require(fishers_NP, requirements=["C", "W"])
