"""Maximum likelihood difference scaling: a perceptual scale from comparisons of differences.

An observer sees three levels i < j < k of a stimulus and tells which of the differences (i, j) and (j, k) is larger. In
the model, the second is chosen with the probability Φ((ψ_k − 2ψ_j + ψ_i)/σ). This is a probit regression without
intercept on the contrasts of the levels, whose coefficients are ψ/σ (Maloney & Yang, Journal of Vision 3:573, 2003;
Knoblauch & Maloney, Journal of Statistical Software 25:2, 2008). The scale is 0 at the first level and 1 at the last.

Legend: n levels, T distinct triplets, S draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import ArrayLike, NDArray

_STEPS = 100
"""Largest number of Newton steps."""
_TOLERANCE = 1e-9
"""Largest relative change of a coefficient in the last Newton step."""
_MOST_CERTAIN = 1e3
"""Value of 1/σ above which the answers have no errors, so that σ cannot be estimated."""


def triplets(n_levels: int = 13, largest_gap: int = 3, largest_difference: int = 3) -> NDArray[np.int64]:
    """Return the triplets (T, 3) of an experiment: i < j < k with gaps of at most `largest_gap` levels.

    The default gives the 81 triplets of Vacher & Mamassian 2024.

    Args:
        n_levels: Number of levels, at least 3.
        largest_gap: Largest value of j − i and of k − j.
        largest_difference: Largest difference between the two gaps.

    Raises:
        ValueError: There are fewer than 3 levels, or no gap.
    """
    if n_levels < 3 or largest_gap < 1 or largest_difference < 0:
        raise ValueError("n_levels must be at least 3, largest_gap at least 1 and largest_difference at least 0")
    gaps = range(1, largest_gap + 1)
    found = [
        (i, i + first, i + first + second)
        for i in range(n_levels)
        for first in gaps
        for second in gaps
        if abs(first - second) <= largest_difference and i + first + second < n_levels
    ]
    return np.array(found, np.int64)


def answer_probability(psi_n: ArrayLike, sigma: float, triplets_T3: ArrayLike) -> NDArray[np.float64]:
    """Compute the probability that the second difference, (j, k), is called the larger one.

    Args:
        psi_n: The scale at the levels, (n,).
        sigma: Standard deviation of the noise of the comparison, positive.
        triplets_T3: Levels (i, j, k) of each triplet, (T, 3).

    Returns:
        The probabilities, (T,).
    """
    psi, shown_T3 = np.asarray(psi_n, np.float64), np.asarray(triplets_T3)
    i_T, j_T, k_T = (psi[shown_T3[:, place]] for place in range(3))
    probability_T: NDArray[np.float64] = scipy.special.ndtr((k_T - 2 * j_T + i_T) / sigma)
    return probability_T


@dataclass(frozen=True)
class Interval:
    """Bootstrap intervals of a scale."""

    low_n: NDArray[np.float64]
    """Lower ends, (n,)."""
    high_n: NDArray[np.float64]
    """Upper ends, (n,)."""
    sigma: tuple[float, float]
    """The interval of σ."""
    n_left_out: int
    """Number of draws that have no estimate, because their answers have no errors or do not determine the scale."""


class DifferenceScaling:
    """Estimator of a perceptual scale from answers about triplets.

    Args:
        n_levels: Number of levels. The default is the largest level of the answers plus 1.

    Attributes:
        psi_: The scale (n,), 0 at the first level and 1 at the last.
        sigma_: Standard deviation of the noise, in units of the scale.
        log_likelihood_: Log-likelihood of the answers in nats.

    Examples:
        >>> import numpy as np
        >>> from npeff.perception.difference_scaling import DifferenceScaling, answer_probability, triplets
        >>> truth, shown = np.linspace(0, 1, 7) ** 2, np.repeat(triplets(7), 200, axis=0)
        >>> answers = np.random.default_rng(0).random(len(shown)) < answer_probability(truth, 0.1, shown)
        >>> scaling = DifferenceScaling().fit(np.column_stack([shown, answers]))
        >>> bool(np.abs(scaling.psi_ - truth).max() < 0.05)
        True
    """

    psi_: NDArray[np.float64]
    sigma_: float
    log_likelihood_: float

    def __init__(self, n_levels: int | None = None) -> None:
        self.n_levels = n_levels

    def fit(self, responses: ArrayLike) -> DifferenceScaling:
        """Estimate the scale by maximum likelihood (Newton's method; the log-likelihood is concave).

        Args:
            responses: One row (i, j, k, answer) per trial, (trials, 4): levels i < j < k, counted from 0, and the
                answer 1 if the difference (j, k) was called the larger one, and 0 otherwise.

        Returns:
            The estimator.

        Raises:
            ValueError: A row is not of this form, a level is never shown, the triplets do not determine the scale, or
                the answers have no errors, so that σ cannot be estimated.
        """
        rows_N4 = _checked(responses)
        n_levels = int(rows_N4[:, 2].max()) + 1 if self.n_levels is None else self.n_levels
        if rows_N4[:, 2].max() >= n_levels:
            raise ValueError(f"level {int(rows_N4[:, 2].max())} is shown, but n_levels is {n_levels}")
        shown = np.unique(rows_N4[:, :3])
        if len(shown) < n_levels:
            missing = int(np.argmax(np.append(shown, -1) != np.arange(len(shown) + 1)))
            raise ValueError(f"level {missing} is never shown: leave it out and number the others anew")
        triplets_T3, of_N = np.unique(rows_N4[:, :3], axis=0, return_inverse=True)
        counts_T2 = np.zeros((len(triplets_T3), 2))
        np.add.at(counts_T2, (of_N.ravel(), rows_N4[:, 3]), 1)
        self._contrasts_Tn = _contrasts(triplets_T3, n_levels)
        if np.linalg.matrix_rank(self._contrasts_Tn) < n_levels - 1:
            raise ValueError("the triplets do not determine the scale: show some with two different gaps as well")
        self._counts_T2 = counts_T2
        found = _maximum_likelihood(self._contrasts_Tn, counts_T2)
        if found is None:
            raise ValueError(
                "the answers have no errors, or contradict any scale: show smaller differences, more often"
            )
        self._slopes_n, self.log_likelihood_ = found
        self.psi_, self.sigma_ = _normalized(self._slopes_n)
        return self

    def intervals(self, confidence_level: float = 0.99, *, n_draws: int = 1000, seed: int = 0) -> Interval:
        """Compute percentile bootstrap intervals, with trials drawn with replacement.

        Args:
            confidence_level: Probability of the intervals.
            n_draws: Number of draws S.
            seed: Seed of the draws.

        Raises:
            ValueError: No draw has an estimate.
        """
        generator = np.random.default_rng(seed)
        n_trials = int(self._counts_T2.sum())
        drawn_ST2 = generator.multinomial(n_trials, (self._counts_T2 / n_trials).ravel(), size=n_draws)
        found = [
            _maximum_likelihood(self._contrasts_Tn, drawn_T2.reshape(-1, 2), self._slopes_n) for drawn_T2 in drawn_ST2
        ]
        scales = [_normalized(each[0]) for each in found if each is not None]
        if not scales:
            raise ValueError("no bootstrap draw has an estimate, because there are too few answers: collect more")
        tails = [(1 - confidence_level) / 2, (1 + confidence_level) / 2]
        low_n, high_n = np.quantile([psi_n for psi_n, _ in scales], tails, axis=0)
        sigma = np.quantile([sigma for _, sigma in scales], tails)
        return Interval(low_n, high_n, (float(sigma[0]), float(sigma[1])), n_draws - len(scales))


def _checked(responses: ArrayLike) -> NDArray[np.int64]:
    """Return the answers as whole numbers."""
    given = np.asarray(responses, np.float64)
    if given.ndim != 2 or given.shape[1] != 4 or not len(given):
        raise ValueError("responses must have one row (i, j, k, answer) per trial")
    whole = (np.abs(given) < 2**53).all(1) & (given == np.floor(given)).all(1)
    ordered = (given[:, 0] >= 0) & (given[:, 0] < given[:, 1]) & (given[:, 1] < given[:, 2])
    right = whole & ordered & np.isin(given[:, 3], (0, 1))
    if not right.all():
        row = int(np.argmin(right))
        shown = ", ".join(f"{value:g}" for value in given[row])
        raise ValueError(f"row {row} is ({shown}): it must be levels i < j < k, and the answer 0 or 1")
    return given.astype(np.int64)


def _contrasts(triplets_T3: NDArray[np.int64], n_levels: int) -> NDArray[np.float64]:
    """Return the coefficients of ψ in the decision, (T, n − 1), without the first level, whose scale is 0."""
    contrasts_Tn = np.zeros((len(triplets_T3), n_levels))
    for place, coefficient in enumerate((1.0, -2.0, 1.0)):
        contrasts_Tn[np.arange(len(triplets_T3)), triplets_T3[:, place]] = coefficient
    return contrasts_Tn[:, 1:]


def _maximum_likelihood(
    contrasts_Tn: NDArray[np.float64], counts_T2: NDArray[np.float64], start_n: NDArray[np.float64] | None = None
) -> tuple[NDArray[np.float64], float] | None:
    """Maximize the log-likelihood of the probit regression.

    Args:
        contrasts_Tn: Coefficients of the decision, (T, n − 1).
        counts_T2: Number of answers 0 and 1 of each triplet, (T, 2).
        start_n: The start, (n − 1,); that of a straight line if None.

    Returns:
        The coefficients ψ/σ, (n − 1,), and the log-likelihood. None without a finite maximum, or if the estimated scale
        does not increase from the first to the last level.
    """
    n = contrasts_Tn.shape[1]
    slopes_n = np.linspace(1 / n, 1, n) if start_n is None else start_n
    value = _log_likelihood(contrasts_Tn @ slopes_n, counts_T2)
    for _ in range(_STEPS):
        decision_T = contrasts_Tn @ slopes_n
        log_p_T2 = scipy.special.log_ndtr(np.stack([-decision_T, decision_T], 1))
        hazards_T2 = np.exp(-(decision_T[:, None] ** 2) / 2 - log_p_T2) / np.sqrt(2 * np.pi)
        gradient_n = contrasts_Tn.T @ (counts_T2[:, 1] * hazards_T2[:, 1] - counts_T2[:, 0] * hazards_T2[:, 0])
        curvature_T = counts_T2[:, 1] * hazards_T2[:, 1] * (hazards_T2[:, 1] + decision_T)
        curvature_T += counts_T2[:, 0] * hazards_T2[:, 0] * (hazards_T2[:, 0] - decision_T)
        try:
            step_n = np.linalg.solve(contrasts_Tn.T @ (curvature_T[:, None] * contrasts_Tn), gradient_n)
        except np.linalg.LinAlgError:
            return None
        if not np.isfinite(step_n).all() or np.abs(slopes_n).max() > _MOST_CERTAIN:
            return None
        if np.abs(step_n).max() <= _TOLERANCE * (1 + np.abs(slopes_n).max()):
            return (slopes_n, value) if slopes_n[-1] > 0 else None
        size, rounding = 1.0, 1e-12 * (1 + abs(value))
        while (after := _log_likelihood(contrasts_Tn @ (slopes_n + size * step_n), counts_T2)) < value - rounding:
            size /= 2
        slopes_n, value = slopes_n + size * step_n, after
    return None


def _log_likelihood(decision_T: NDArray[np.float64], counts_T2: NDArray[np.float64]) -> float:
    log_p_T2 = scipy.special.log_ndtr(np.stack([-decision_T, decision_T], 1))
    return float((counts_T2 * log_p_T2).sum())


def _normalized(slopes_n: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return the scale with the first level, and σ."""
    return np.concatenate([[0.0], slopes_n]) / slopes_n[-1], float(1 / slopes_n[-1])
