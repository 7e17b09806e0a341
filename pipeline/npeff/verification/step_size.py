"""Search for the step size along a direction that yields a given mean KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

RELATIVE_TOLERANCE = 0.01
"""Relative tolerance of the mean KL divergence, unless another one is given."""

MAX_EVALUATIONS = 60
_LARGEST_FACTOR = 100.0
"""Largest factor between a guess and the next one."""


@dataclass(frozen=True)
class StepSize:
    """A step size ε, the mean KL divergence (nats) at ε, and whether it reaches the target."""

    epsilon: float
    kl: float
    reached_target: bool


def find_step_size(
    kl_at: Callable[[float], float],
    target_kl: float,
    *,
    longest: float,
    first: float | None = None,
    tolerance: float = RELATIVE_TOLERANCE,
    max_evaluations: int = MAX_EVALUATIONS,
) -> StepSize:
    """Find the step size ε > 0 at which ``kl_at(ε)`` equals ``target_kl`` within a tolerance.

    The first guess is corrected with the assumption that KL is quadratic in ε, which holds approximately for small ε.
    Further guesses are on the line through the last two, in log ε and log KL. Once two guesses bracket the target, the
    next guess is the log-linear interpolation between them. Every third guess bisects log ε, so that the search
    converges for any KL.

    Args:
        kl_at: Function that returns the mean KL divergence of the top examples at a step size. It may return infinity.
        target_kl: The mean KL divergence to reach.
        longest: Maximum step size. If it yields less than the target, it is the result and ``reached_target`` is False.
        first: The first guess, such as the step size of a similar search. By default 1e-3 times ``longest``.
        tolerance: Relative tolerance of the mean KL divergence.
        max_evaluations: Number of further calls of ``kl_at`` after which the search ends without reaching the target.

    Returns:
        The step size. ``kl_at`` was last called with it.
    """
    epsilon = longest * 1e-3 if first is None else min(first, longest)
    best = StepSize(epsilon, kl_at(epsilon), False)
    below, above = StepSize(0.0, 0.0, False), StepSize(math.inf, math.inf, False)
    n_brackets, exponent = 0, 2.0
    for evaluations_left in reversed(range(max_evaluations + 1)):
        if abs(best.kl - target_kl) <= tolerance * target_kl:
            return StepSize(best.epsilon, best.kl, True)
        if not evaluations_left:
            break
        if best.kl < target_kl:
            below = best
        else:
            above = best
        if below.epsilon >= longest:
            return best
        if below.epsilon > 0 and math.isfinite(above.epsilon):
            n_brackets += 1
            fraction = 0.5 if n_brackets % 3 == 0 else _interpolation_fraction(below.kl, above.kl, target_kl)
            epsilon = below.epsilon * (above.epsilon / below.epsilon) ** fraction
        else:
            known = 0 < best.kl < math.inf
            factor = (target_kl / best.kl) ** (1 / exponent) if known else (10.0 if below.epsilon else 0.1)
            epsilon = min(best.epsilon * min(max(factor, 0.01), _LARGEST_FACTOR), longest)
        before, best = best, StepSize(epsilon, kl_at(epsilon), False)
        exponent = _exponent(before, best)
    return best


def _exponent(one: StepSize, other: StepSize) -> float:
    """Return the exponent of ε in KL between two step sizes; 2 where it cannot be measured."""
    if one.epsilon == other.epsilon or not (0 < one.kl < math.inf and 0 < other.kl < math.inf):
        return 2.0
    return min(max(math.log(other.kl / one.kl) / math.log(other.epsilon / one.epsilon), 1.0), 8.0)


def _interpolation_fraction(kl_below: float, kl_above: float, target_kl: float) -> float:
    """Interpolate the position of the target between log ε_below (0) and log ε_above (1), with log KL linear.

    The result is never 0 or 1.
    """
    if kl_below <= 0 or math.isinf(kl_above):
        return 0.5
    return min(max(math.log(target_kl / kl_below) / math.log(kl_above / kl_below), 0.02), 0.98)
