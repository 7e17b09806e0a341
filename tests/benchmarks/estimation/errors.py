"""Bias and noise of an estimator's trace, diagonal and spectrum against the dense matrix.

Legend: n rows, P parameters, S repetitions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from npeff.fisher.spectrum import effective_rank, nonnegative
from scipy.stats import rankdata
from torch import Tensor

from estimation.estimates import ESTIMATORS, Estimator
from estimation.moments import Moment, dense_rows

REPETITIONS = 6


class Dense:
    """The dense matrix F = Bᵀ B of a moment, by its rows B in float64. It is never formed: only B Bᵀ is."""

    def __init__(self, moment: Moment) -> None:
        self.rows_nP = dense_rows(moment)
        self.diagonal_P = self.rows_nP.square().sum(0)
        self.trace = float(self.diagonal_P.sum())
        gram_nn = self.rows_nP @ self.rows_nP.T
        self.norm_squared = float(gram_nn.square().sum())
        self.eigenvalues = _eigenvalues(gram_nn)
        self._ranks_P = rankdata(self.diagonal_P.numpy())

    def errors(self, rows_nP: Tensor) -> dict[str, Any]:
        """Return the errors of one estimate, relative to the dense matrix. Products have the precision of its rows."""
        diagonal_P, gram_nn = rows_nP.double().square().sum(0), (rows_nP @ rows_nP.T).double()
        cross = float((rows_nP @ self.rows_nP.T.to(rows_nP)).double().square().sum())
        norm_squared = float(gram_nn.square().sum())
        eigenvalues = _eigenvalues(gram_nn)
        both = [np.zeros(max(len(eigenvalues), len(self.eigenvalues))) for _ in range(2)]
        both[0][: len(eigenvalues)], both[1][: len(self.eigenvalues)] = eigenvalues, self.eigenvalues
        ranks_P = rankdata(diagonal_P.numpy())
        return {
            "diagonal_P": diagonal_P / self.diagonal_P.norm(),
            "trace": float(diagonal_P.sum()) / self.trace,
            "rank_correlation": float(np.corrcoef(ranks_P, self._ranks_P)[0, 1]),
            "matrix": max(norm_squared - 2 * cross + self.norm_squared, 0.0) ** 0.5 / self.norm_squared**0.5,
            "largest": float(eigenvalues[0] / self.eigenvalues[0]),
            "effective_rank": effective_rank(eigenvalues) / effective_rank(self.eigenvalues),
            "spectrum": float(np.abs(both[0] - both[1]).sum() / self.trace),
        }


def measured(moment: Moment, dense: Dense) -> dict[str, Any]:
    """Measure every estimator at a moment."""
    return {estimator.name: _measured(estimator, moment, dense) for estimator in ESTIMATORS}


def _measured(estimator: Estimator, moment: Moment, dense: Dense) -> dict[str, Any]:
    n, dtype = (REPETITIONS, torch.float32) if estimator.random else (1, torch.float64)
    found = [dense.errors(estimator.rows(moment.model, moment.images, seed).to(dtype)) for seed in range(n)]
    unit_P = dense.diagonal_P / dense.diagonal_P.norm()
    diagonals_SP = torch.stack([each.pop("diagonal_P") for each in found])
    deviations_P = diagonals_SP.mean(0) - unit_P
    variance = float(diagonals_SP.var(0).sum()) if n > 1 else 0.0
    # the mean of S estimates differs from their expectation, by the variance divided by S
    bias = max(float(deviations_P.square().sum()) - variance / n, 0.0) ** 0.5
    error = float((diagonals_SP - unit_P).square().sum(1).mean()) ** 0.5
    rows: dict[str, Any] = {"diagonal": {"bias": bias, "noise": variance**0.5, "error": error}}
    for name in found[0]:
        values = np.array([each[name] for each in found])
        rows[name] = {"mean": float(values.mean()), "noise": float(values.std(ddof=1)) if n > 1 else 0.0}
    return rows


def _eigenvalues(gram_nn: Tensor) -> np.ndarray:
    return nonnegative(np.linalg.eigvalsh(gram_nn.numpy()))
