"""Does a component stand for a mistake, and does a step along its direction mend it: the statistics of a repair.

A component whose top examples are wrong more often than others is a candidate (`over_represented`). A step along its
direction, of a sign and size chosen on a tuning split (`choose_step`), is then judged on examples that had no part in
any choice, by predictions that changed (`mcnemar`).

Legend: N examples, K components, J of them that are moved along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from npeff.statistics.contingency import exact_tests

_ROUNDING = 1e-9
"""Examples by which a share of a number of them may be off for want of digits."""

_RIDGE = 1e-6
_LEAST_GAIN = 1e-4
"""Share of the loss that an iteration must still save."""


@dataclass(frozen=True)
class OverRepresentation:
    """Wrong predictions among each component's top examples, against those among all examples. Arrays of K."""

    n_top_K: NDArray[np.int64]
    n_wrong_K: NDArray[np.int64]
    """Wrong ones of the top examples."""
    odds_ratios_K: NDArray[np.float64]
    """As of `exact_tests`, as are the others."""
    p_values_K: NDArray[np.float64]
    q_values_K: NDArray[np.float64]


def over_represented(
    top_examples: Sequence[NDArray[np.int64]], wrong_N: NDArray[np.bool_], among_N: NDArray[np.bool_]
) -> OverRepresentation:
    """One-sided hypergeometric tests (Fisher's exact test) of each component.

    Args:
        top_examples: numbers of each component's top examples, all marked in ``among_N``, none twice.
        wrong_N: whether the prediction is wrong.
        among_N: marks the examples that could have been in the top: those whose label is known, of the split in use.

    Raises ValueError if a top example is not marked or there twice.
    """
    for top in top_examples:
        if not among_N[top].all() or len(np.unique(top)) != len(top):
            raise ValueError("top examples must be different ones of those that are marked")
    n_top_K = np.array([len(top) for top in top_examples], dtype=np.int64)
    n_wrong_K = np.array([wrong_N[top].sum() for top in top_examples], dtype=np.int64)
    tests = exact_tests(int(among_N.sum()), int((wrong_N & among_N).sum()), n_top_K, n_wrong_K)
    return OverRepresentation(n_top_K, n_wrong_K, tests.odds_ratios_K, tests.p_values_K, tests.q_values_K)


@dataclass(frozen=True)
class Edit:
    """A step along a component's unit direction: its sign times its length."""

    component: int
    step: float


@dataclass(frozen=True)
class RepairCandidate:
    """An edit, or several at once, and what they do on the tuning split."""

    edits: tuple[Edit, ...]
    target_N: NDArray[np.bool_]
    """What is to be mended: the components' top examples that are wrong."""
    correct_after_N: NDArray[np.bool_]

    @property
    def length(self) -> float:
        """Of the steps, as if their directions were orthogonal."""
        return math.hypot(*(edit.step for edit in self.edits))

    def broken(self, unedited_correct_N: NDArray[np.bool_]) -> int:
        """Predictions that were right before all edits, and are wrong after this step."""
        return int((unedited_correct_N & ~self.correct_after_N).sum())


def choose_step(
    candidates: Sequence[RepairCandidate],
    correct_before_N: NDArray[np.bool_],
    unedited_correct_N: NDArray[np.bool_],
    max_harm: float,
) -> RepairCandidate | None:
    """The candidate with the best accuracy after it on the whole tuning split, of those that do no harm.

    Harmless is one after which at most a share ``max_harm`` of the predictions that were right before all edits are
    wrong; what was mended elsewhere does not make up for them. None if no harmless candidate mends a target and betters
    the accuracy. Of equals the smaller step is taken, then the lower component, then the positive sign. The accuracy of
    the chosen one is the best of many, so it says nothing: measure it on other examples. Raises ValueError for a
    candidate of another number of examples.
    """
    helpful: list[tuple[tuple[object, ...], RepairCandidate]] = []
    for candidate in candidates:
        after_N = candidate.correct_after_N
        if not after_N.shape == correct_before_N.shape == unedited_correct_N.shape:
            raise ValueError("candidates must be of the tuning split whose correctness before is given")
        gained = int(after_N.sum()) - int(correct_before_N.sum())
        mended = int(after_N[candidate.target_N].sum()) - int(correct_before_N[candidate.target_N].sum())
        harmless = candidate.broken(unedited_correct_N) <= max_harm * int(unedited_correct_N.sum()) + _ROUNDING
        if harmless and mended > 0 and gained > 0:
            last = [(edit.component, edit.step < 0) for edit in candidate.edits]
            helpful.append(((-gained, candidate.length, last), candidate))
    return min(helpful, key=lambda pair: pair[0])[1] if helpful else None


def joint_steps(
    slopes_at: Callable[[NDArray[np.float64]], tuple[float, NDArray[np.float64]]],
    start_J: NDArray[np.float64],
    unit: float,
    max_passes: int,
) -> NDArray[np.float64]:
    """Steps along J directions at once, (J,), at which a loss is low: L-BFGS from `start_J`.

    Minimised is the loss with `_RIDGE` Σ (step/unit)² added: directions that add nothing are left alone.

    Args:
        slopes_at: the loss at some steps, and its derivatives by them.
        unit: a step at which the model begins to change.
        max_passes: most calls of `slopes_at`, give or take those of the last iteration.
    """

    def scaled(b_J: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        loss, slopes_J = slopes_at(b_J * unit)
        return loss + _RIDGE * float(b_J @ b_J), slopes_J * unit + 2 * _RIDGE * b_J

    found = optimize.minimize(
        scaled, start_J / unit, jac=True, method="L-BFGS-B", options={"maxfun": max_passes, "ftol": _LEAST_GAIN}
    )
    steps_J: NDArray[np.float64] = found.x * unit
    return steps_J
