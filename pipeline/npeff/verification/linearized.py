"""KL divergences of a step, predicted from stored factors, without a pass through the model.

A step ε along a direction g changes the logits of an example by ε·J g to first order, with J = ∂z/∂θ. The rows of the
Fisher factor are A = LᵀJ, where L Lᵀ = diag(p) − p pᵀ. The stored sketches of A and g give a = A g, and a gives J g up
to a constant that all logits share, which changes no probability. The prediction is the exact KL divergence between the
softmax of z + ε·J g and of z. Where L is not known, because the labels are drawn or the logits are not stored, it is
the leading term ½ ε² ‖A g‖².

Legend: n examples, R rows, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEAST_PIVOT = 1e-4
"""Diagonal entry of L, relative to the largest one of the example, below which the sketched row is noise. A class with
such an entry has a probability below about 1e-8, and the change of its logit has no effect on the KL divergence."""


def triangular_changes(products_nR: NDArray[np.float64], factors_nCR: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve Lᵀu = a for the Cholesky factor L of `exact` labels, R = C − 1.

    The solution is the one with u = 0 for the last class. This is Lᵀ's pseudo-inverse up to a constant.

    Args:
        products_nR: a = A g.
        factors_nCR: L of every example, zero above the diagonal.

    Returns:
        Changes of the logits per unit of the step, (n, C).
    """
    n_classes = factors_nCR.shape[1]
    changes_nC = np.zeros((len(factors_nCR), n_classes))
    least_n = _LEAST_PIVOT * np.abs(np.diagonal(factors_nCR, axis1=1, axis2=2)).max(axis=1, initial=0.0)
    for row in reversed(range(n_classes - 1)):
        below_n = (factors_nCR[:, row + 1 :, row] * changes_nC[:, row + 1 :]).sum(axis=1)
        pivot_n = factors_nCR[:, row, row]
        known_n = np.where(np.abs(pivot_n) >= least_n, products_nR[:, row], 0.0)
        # a row of noise counts as zero: the class then moves with the mean of the following ones
        changes_nC[:, row] = np.divide(known_n - below_n, pivot_n, out=np.zeros_like(pivot_n), where=pivot_n > 1e-150)
    return changes_nC


def orthogonal_changes(products_nR: NDArray[np.float64], factors_nCR: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute pinv(Lᵀ) a for a factor L with orthogonal columns, as that of `truncated` labels.

    Args:
        products_nR: a = A g.
        factors_nCR: L of every example. Unused columns are zero.

    Returns:
        Changes of the logits per unit of the step, (n, C).
    """
    squares_nR = np.square(factors_nCR).sum(axis=1)
    least_n1 = _LEAST_PIVOT**2 * squares_nR.max(axis=1, keepdims=True, initial=0.0)
    used_nR = (squares_nR > 0) & (squares_nR >= least_n1)
    scaled_nR = np.divide(products_nR, squares_nR, out=np.zeros_like(squares_nR), where=used_nR)
    changes_nC: NDArray[np.float64] = np.einsum("ncr,nr->nc", factors_nCR, scaled_nR)
    return changes_nC


@dataclass(frozen=True)
class Linearized:
    """The predicted effect of a direction on n examples."""

    evidence_n: NDArray[np.float64]
    """‖A g‖²."""
    logits_nC: NDArray[np.float64] | None = None
    """Logits z of the model; None if they are not known."""
    changes_nC: NDArray[np.float64] | None = None
    """J g, up to a constant of each example."""

    def kl(self, step: float) -> NDArray[np.float64]:
        """Predict KL(p_moved ‖ p_original) in nats for a step, its length with its sign."""
        if self.logits_nC is None or self.changes_nC is None:
            return 0.5 * step**2 * self.evidence_n
        before_nC, after_nC = (_log_softmax(z) for z in (self.logits_nC, self.logits_nC + step * self.changes_nC))
        with np.errstate(invalid="ignore"):
            terms_nC = np.where(after_nC > -math.inf, np.exp(after_nC) * (after_nC - before_nC), 0.0)
        kl_n: NDArray[np.float64] = np.maximum(terms_nC.sum(axis=1), 0.0)
        return kl_n

    def confidence_slope(self) -> float | None:
        """Compute the derivative of the mean log-probability of the predicted classes with respect to the step.

        Return None if the changes of the logits are not known.
        """
        if self.logits_nC is None or self.changes_nC is None:
            return None
        p_nC = np.exp(_log_softmax(self.logits_nC))
        predicted_n = self.logits_nC.argmax(axis=1)
        chosen_n = np.take_along_axis(self.changes_nC, predicted_n[:, None], 1)[:, 0]
        return float((chosen_n - (p_nC * self.changes_nC).sum(axis=1)).mean())

    def at(self, places: NDArray[np.int64]) -> Linearized:
        """Return the effect on the examples at ``places``."""
        if self.logits_nC is None or self.changes_nC is None:
            return Linearized(self.evidence_n[places])
        return Linearized(self.evidence_n[places], self.logits_nC[places], self.changes_nC[places])


def _log_softmax(logits_nC: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted_nC = logits_nC - logits_nC.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted_nC - np.log(np.exp(shifted_nC).sum(axis=1, keepdims=True))
    return result
