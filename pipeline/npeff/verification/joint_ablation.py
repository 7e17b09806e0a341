"""Subsets of the other components that are removed together, before the effect of one component is measured again.

A component is said to matter to its own examples, and the others not. If so, its effect must not depend on the others:
it is measured again after a random subset of them is removed from the parameters, and after an adversarial one. This is
how components of parameters are judged in stochastic parameter decomposition (Bushnaq et al., arXiv 2506.20790).

The directions d_l of a subset S are not orthogonal. What is removed is the part of θ − θ₀ in their span,

    θ_S = θ − Σ_{l ∈ S} c_l d_l,    c = pinv(D Dᵀ) D (θ − θ₀),    D = the directions of S as rows.

This is the orthogonal projection onto the complement of the span, whatever the scale of the directions. With one unit
direction, c is its displacement ⟨d, θ − θ₀⟩.

The span is not made orthogonal to the direction d_j of the component whose effect is measured. If d_j overlaps with the
span, a removal therefore takes away a part of the displacement along d_j, too. The alternative, to project d_j out of
the span first, would keep this displacement. But θ_S would then depend on j, the removal of one direction would not be
its ablation, and the overlap of j with the others, which the test should reveal, would be protected. The displacement
along d_j is not measured: the step along d_j is added to θ_S, and its effect there is well defined for any overlap.

Legend: L other components, S removed ones, n examples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from npeff.statistics.ratio_intervals import Measured
from npeff.verification.linearized import Linearized

CUTOFF = 1e-6
"""Eigenvalue of D Dᵀ, relative to the largest one, below which it counts as zero. A part of the span with such an
eigenvalue is shorter than a thousandth of the directions, which rounding in half precision can cause."""

MOST_EVALUATIONS = 1000
"""Largest number of subsets whose effect is predicted in the search for an adversarial one."""


@dataclass(frozen=True)
class Span:
    """The directions of the other components, by their inner products."""

    gram_LL: NDArray[np.float64]
    displacements_L: NDArray[np.float64]
    """⟨d_l, θ − θ₀⟩."""

    def coefficients(self, removed_L: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the coefficients c (L,) of the removed part Σ c_l d_l of θ − θ₀; 0 for directions that stay."""
        return self._solved(removed_L, self.displacements_L)

    def length(self, coefficients_L: NDArray[np.float64]) -> float:
        """Return ‖Σ c_l d_l‖."""
        return math.sqrt(max(float(coefficients_L @ self.gram_LL @ coefficients_L), 0.0))

    def overlap(self, removed_L: NDArray[np.bool_], products_L: NDArray[np.float64]) -> float:
        """Return the length of the projection of a unit direction onto the span of the removed directions.

        Args:
            removed_L: The removed directions.
            products_L: The inner products of the unit direction with all directions.
        """
        return math.sqrt(min(max(float(products_L @ self._solved(removed_L, products_L)), 0.0), 1.0))

    def _solved(self, removed_L: NDArray[np.bool_], products_L: NDArray[np.float64]) -> NDArray[np.float64]:
        places, solved_L = np.flatnonzero(removed_L), np.zeros(len(removed_L))
        if len(places):
            inverse_SS = np.linalg.pinv(self.gram_LL[np.ix_(places, places)], rcond=CUTOFF, hermitian=True)
            solved_L[places] = inverse_SS @ products_L[places]
        return solved_L


@dataclass(frozen=True)
class PredictedRemovals:
    """The effect of a step after any removal, predicted to first order from the stored sketches.

    The examples are the top examples, followed by the distinct examples of the matched baseline.
    """

    span: Span
    changes_LnC: NDArray[np.float64]
    """J d_l: the change of the logits per unit of a step along each of the other directions."""
    own: Linearized
    """The logits, and the change of the logits per unit of a step along the component's direction."""
    step: float
    """The step, with its sign."""
    n_top: int
    counts_m: NDArray[np.int64]
    """Number of top examples that a baseline example matches."""

    def kl_ratio(self, removed_L: NDArray[np.bool_]) -> float:
        """Predict the matched KL ratio of the step after a removal."""
        assert self.own.logits_nC is not None
        removed_nC = np.tensordot(self.span.coefficients(removed_L), self.changes_LnC, axes=1)
        kl_n = Linearized(self.own.evidence_n, self.own.logits_nC - removed_nC, self.own.changes_nC).kl(self.step)
        return Measured(kl_n[: self.n_top], kl_n[self.n_top :], self.counts_m).ratio


def random_subsets(n_others: int, n_draws: int, seed: int) -> NDArray[np.bool_]:
    """Draw subsets of the other components. Each component is in a subset with probability 1/2.

    Returns:
        Whether a component is in a subset, (n_draws, n_others). Further draws do not change the first ones.
    """
    return np.random.default_rng(seed).random((n_draws, n_others)) < 0.5


def adversarial_subset(
    kl_ratio: Callable[[NDArray[np.bool_]], float], starts: Sequence[NDArray[np.bool_]], seed: int
) -> NDArray[np.bool_]:
    """Search for the subset with the smallest KL ratio.

    The search begins at the best of some subsets. It adds or takes away one component at a time, in random order, as
    long as this lowers the ratio. The result is never worse than a start. It is a local minimum, unless the search ends
    after `MOST_EVALUATIONS` subsets.

    Args:
        kl_ratio: The KL ratio after the removal of a subset (L,). NaN counts as infinite.
        starts: At least one subset to start from.
        seed: Seed of the order.
    """

    def value(subset_L: NDArray[np.bool_]) -> float:
        found = kl_ratio(subset_L)
        return math.inf if math.isnan(found) else found

    values = [value(start) for start in starts]
    least = min(values)
    best_L = starts[values.index(least)].copy()
    generator, n_left = np.random.default_rng(seed), MOST_EVALUATIONS
    n_rejected = 0
    while n_left > 0 and n_rejected < len(best_L):
        n_rejected = 0
        for place in generator.permutation(len(best_L))[:n_left].tolist():
            flipped_L = best_L.copy()
            flipped_L[place] = not flipped_L[place]
            found, n_left = value(flipped_L), n_left - 1
            if found < least:
                best_L, least = flipped_L, found
            else:
                n_rejected += 1
    return best_L
