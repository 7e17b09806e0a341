"""The step size along a direction that reaches a mean KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

RELATIVE_TOLERANCE = 0.01
"""How close to its target the mean KL must come."""


_MAX_EVALUATIONS = 60


@dataclass(frozen=True)
class StepSize:
    """ε, the mean KL it gives, and whether that is the KL that was asked for."""

    epsilon: float
    kl: float
    reached_target: bool


def find_step_size(kl_at: Callable[[float], float], target_kl: float, *, longest: float) -> StepSize:
    """The ε > 0 at which ``kl_at(ε)`` is ``target_kl``, to 1%.

    KL is near quadratic in a small ε, which gives the first guesses. Once two of them enclose the target, the line
    through both, in logarithms, gives the next; every third guess bisects log ε, so that they close in whatever the KL
    does.

    Args:
        kl_at: mean KL of the top examples at a step size; may return infinity.
        longest: step size that is not exceeded; where it gives less than the target, it is the answer and
            ``reached_target`` is False.
    """
    epsilon = longest * 1e-3
    best = StepSize(epsilon, kl_at(epsilon), False)
    below, above = StepSize(0.0, 0.0, False), StepSize(math.inf, math.inf, False)
    n_enclosed = 0
    for _ in range(_MAX_EVALUATIONS):
        if abs(best.kl - target_kl) <= RELATIVE_TOLERANCE * target_kl:
            return StepSize(best.epsilon, best.kl, True)
        if best.kl < target_kl:
            below = best
        else:
            above = best
        if below.epsilon >= longest:
            return best
        if below.epsilon > 0 and math.isfinite(above.epsilon):
            n_enclosed += 1
            share = 0.5 if n_enclosed % 3 == 0 else _share_of_the_way(below.kl, above.kl, target_kl)
            epsilon = below.epsilon * (above.epsilon / below.epsilon) ** share
        else:
            factor = math.sqrt(target_kl / best.kl) if 0 < best.kl < math.inf else (10.0 if below.epsilon else 0.1)
            epsilon = min(best.epsilon * min(max(factor, 0.01), 10.0), longest)
        best = StepSize(epsilon, kl_at(epsilon), False)
    return best


def _share_of_the_way(kl_below: float, kl_above: float, target_kl: float) -> float:
    """Where between log ε_below (0) and log ε_above (1) the target is, if log KL is linear there; never at an end."""
    if kl_below <= 0 or math.isinf(kl_above):
        return 0.5
    return min(max(math.log(target_kl / kl_below) / math.log(kl_above / kl_below), 0.02), 0.98)
