"""Move a model's parameters along a direction and see which predictions change.

A component claims: examples with large coefficients are treated alike, along this direction. The test (Matena & Raffel,
arXiv 2310.04649, section 5) moves θ by ±ε·ĝ with ‖ĝ‖ = 1 and compares the mean KL(p_moved ‖ p_original) on the top
examples with that on a baseline: their quotient is the KL ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RELATIVE_TOLERANCE = 0.01
"""How close to its target the mean KL must come."""

_MAX_EVALUATIONS = 60

_LEAST_LEFT = 1e-3


@contextmanager
def moved(model: nn.Module, direction: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """θ + step·direction inside the context; outside it every parameter has its former bits, also after an exception.

    Args:
        direction: tensors by parameter name; parameters that it does not name stay.
        step: ε times the sign, in units of the direction's length.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {name: parameters[name].detach().clone() for name in direction}
    try:
        with torch.no_grad():
            for name, tensor in direction.items():
                parameters[name].add_(tensor.to(parameters[name]), alpha=step)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)


def kl_divergence(moved_logits_BC: Tensor, original_logits_BC: Tensor) -> Tensor:
    """KL(p_moved ‖ p_original) of every example, nats, in float64; infinite where the moved logits are not finite."""
    moved_log_p, original_log_p = (z.double().log_softmax(-1) for z in (moved_logits_BC, original_logits_BC))
    kl_B = torch.where(moved_log_p.exp() > 0, moved_log_p.exp() * (moved_log_p - original_log_p), 0.0).sum(-1)
    return torch.where(torch.isfinite(moved_logits_BC).all(-1), kl_B.clamp_min(0.0), math.inf)


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


def displacement(
    model: nn.Module, direction: Mapping[str, Tensor], origin: Mapping[str, Tensor] | None = None
) -> float:
    """ĝᵀ(θ − θ₀), how far the parameters have gone along a unit direction ĝ from `origin`, θ₀, or from zero.

    A step of minus this takes that part out of them: θ − ĝ ĝᵀ(θ − θ₀), the projection that leaves nothing along ĝ.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = 0.0
    for name, tensor in direction.items():
        moved_by = parameters[name].detach().double()
        if origin is not None:
            moved_by = moved_by - origin[name].to(moved_by)
        total += float((moved_by * tensor.to(moved_by)).sum())
    return total


def orthogonalized(direction: Mapping[str, Tensor], others: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor] | None:
    """The unit direction of what is left of a unit direction outside the span of others; None if that is too little
    (a thousandth of it) to be told from rounding."""
    if not others:
        return dict(direction)
    gram_ll = torch.tensor(
        [[inner_product(first, second) for second in others] for first in others], dtype=torch.float64
    )
    products_l = torch.tensor([inner_product(other, direction) for other in others], dtype=torch.float64)
    weights_l = torch.linalg.pinv(gram_ll, hermitian=True) @ products_l
    left = {}
    for name, tensor in direction.items():
        rest = tensor.double()
        for weight, other in zip(weights_l.tolist(), others, strict=True):
            rest = rest - weight * other[name].to(rest)
        left[name] = rest
    length = math.sqrt(inner_product(left, left))
    if length < _LEAST_LEFT:
        return None
    return {name: (rest / length).to(direction[name]) for name, rest in left.items()}


def inner_product(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Of two directions in parameter space, of which the first names the parameters; added up in float64."""
    return sum(float((first[name].double() * second[name].to(first[name]).double()).sum()) for name in first)


def parameter_norm(model: nn.Module, direction: Mapping[str, Tensor]) -> float:
    """‖θ‖₂ over the parameters that ``direction`` names: a step as long as this is no longer a perturbation."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return math.sqrt(sum(float(parameters[name].detach().double().square().sum()) for name in direction))
