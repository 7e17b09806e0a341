"""Statistics of a repair: which components represent mistakes, and which steps along their directions correct them.

A component is a candidate if wrong predictions are over-represented among its top examples (`over_represented`). The
sign and size of a step along its direction are chosen on a tuning split (`choose_step`). The step is then evaluated on
examples that took no part in any choice, by the number of predictions that changed (`mcnemar`).

Legend: N examples, K components, J components of a joint step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy  # imports its subpackages on first use, which takes half a second for scipy.optimize
from numpy.typing import NDArray

from npeff.statistics.contingency import exact_tests

_ROUNDING = 1e-9
"""Tolerance, in examples, for the rounding error of a fraction times a number of examples."""

_RIDGE = 1e-6
_MIN_DECREASE = 1e-4
"""The optimizer stops when an iteration reduces the loss by less than this fraction."""


@dataclass(frozen=True)
class OverRepresentation:
    """Tests for over-represented wrong predictions among each component's top examples. Arrays of length K.

    `odds_ratios_K`, `p_values_K` and `q_values_K` are those of `exact_tests`.
    """

    n_top_K: NDArray[np.int64]
    """Number of top examples."""
    n_wrong_K: NDArray[np.int64]
    """Number of top examples with a wrong prediction."""
    odds_ratios_K: NDArray[np.float64]
    p_values_K: NDArray[np.float64]
    q_values_K: NDArray[np.float64]


def over_represented(
    top_examples: Sequence[NDArray[np.int64]], wrong_N: NDArray[np.bool_], among_N: NDArray[np.bool_]
) -> OverRepresentation:
    """Test each component for wrong predictions among its top examples, with Fisher's exact test (one-sided).

    Args:
        top_examples: Positions of the top examples of each component: distinct, and all marked in ``among_N``.
        wrong_N: Whether the prediction on an example is wrong.
        among_N: Marks the examples that could be top examples: those of the split in use whose label is known.

    Returns:
        Counts and test results of each component.

    Raises:
        ValueError: A top example is not marked or occurs twice.
    """
    for top in top_examples:
        if not among_N[top].all() or len(np.unique(top)) != len(top):
            raise ValueError("top examples must be distinct and marked in among_N")
    n_top_K = np.array([len(top) for top in top_examples], dtype=np.int64)
    n_wrong_K = np.array([wrong_N[top].sum() for top in top_examples], dtype=np.int64)
    tests = exact_tests(int(among_N.sum()), int((wrong_N & among_N).sum()), n_top_K, n_wrong_K)
    return OverRepresentation(n_top_K, n_wrong_K, tests.odds_ratios_K, tests.p_values_K, tests.q_values_K)


@dataclass(frozen=True)
class Edit:
    """A step along a component's unit direction. `step` is the sign times the length."""

    component: int
    step: float


@dataclass(frozen=True)
class RepairCandidate:
    """One edit, or several joint edits, with their results on the tuning split."""

    edits: tuple[Edit, ...]
    target_N: NDArray[np.bool_]
    """The examples to correct: the components' top examples with a wrong prediction."""
    correct_after_N: NDArray[np.bool_]
    """Whether the prediction on an example is correct after the edits."""

    @property
    def length(self) -> float:
        """The total length of the steps, computed as if their directions were orthogonal."""
        return math.hypot(*(edit.step for edit in self.edits))

    def broken(self, unedited_correct_N: NDArray[np.bool_]) -> int:
        """Count the predictions that were correct before all edits and are wrong after this candidate."""
        return int((unedited_correct_N & ~self.correct_after_N).sum())


def choose_step(
    candidates: Sequence[RepairCandidate],
    correct_before_N: NDArray[np.bool_],
    unedited_correct_N: NDArray[np.bool_],
    max_harm: float,
) -> RepairCandidate | None:
    """Choose the harmless candidate with the best accuracy on the whole tuning split.

    A candidate is harmless if at most the fraction ``max_harm`` of the predictions that were correct before all edits
    are wrong after it. Corrected predictions do not compensate for broken ones. Candidates that correct no target or do
    not improve the accuracy are excluded. Ties go to the smaller step, then to the lower component number, then to the
    positive sign. The accuracy of the result is biased, because it is the best of many: measure it on other examples.

    Args:
        candidates: The candidates, evaluated on the tuning split.
        correct_before_N: Whether a prediction is correct before the candidate.
        unedited_correct_N: Whether a prediction is correct before all edits.
        max_harm: Maximum fraction of broken predictions.

    Returns:
        The chosen candidate, or None if no candidate qualifies.

    Raises:
        ValueError: The arrays have different numbers of examples.
    """
    helpful: list[tuple[tuple[object, ...], RepairCandidate]] = []
    for candidate in candidates:
        after_N = candidate.correct_after_N
        if not after_N.shape == correct_before_N.shape == unedited_correct_N.shape:
            raise ValueError("candidates must have the number of examples of correct_before_N and unedited_correct_N")
        gained = int(after_N.sum()) - int(correct_before_N.sum())
        corrected = int(after_N[candidate.target_N].sum()) - int(correct_before_N[candidate.target_N].sum())
        harmless = candidate.broken(unedited_correct_N) <= max_harm * int(unedited_correct_N.sum()) + _ROUNDING
        if harmless and corrected > 0 and gained > 0:
            last = [(edit.component, edit.step < 0) for edit in candidate.edits]
            helpful.append(((-gained, candidate.length, last), candidate))
    return min(helpful, key=lambda pair: pair[0])[1] if helpful else None


def joint_steps(
    loss_and_gradient: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]],
    start_J: NDArray[np.float64],
    unit: float,
    max_passes: int,
) -> NDArray[np.float64]:
    """Minimize a loss over joint steps along J directions with L-BFGS.

    The objective is the loss plus `_RIDGE` Σ (step/unit)². The penalty keeps the steps of directions that do not reduce
    the loss near zero.

    Args:
        loss_and_gradient: Function of the steps (J,) that returns the loss and its gradient (J,).
        start_J: Initial steps.
        unit: Step length at which the model begins to change.
        max_passes: Maximum number of calls of `loss_and_gradient`. The last iteration may exceed it.

    Returns:
        The steps (J,).
    """

    def scaled(b_J: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        loss, gradient_J = loss_and_gradient(b_J * unit)
        return loss + _RIDGE * float(b_J @ b_J), gradient_J * unit + 2 * _RIDGE * b_J

    found = scipy.optimize.minimize(
        scaled, start_J / unit, jac=True, method="L-BFGS-B", options={"maxfun": max_passes, "ftol": _MIN_DECREASE}
    )
    steps_J: NDArray[np.float64] = found.x * unit
    return steps_J
