"""Components tested on the model: directions in parameter space, perturbations along them, and controls."""

from __future__ import annotations

from pipeline.verification.controls import baseline_examples, fisher_norm_ratio, random_direction, top_examples
from pipeline.verification.lift import accumulate_directions, lift_weights, zero_directions
from pipeline.verification.perturbation import (
    StepSize,
    find_step_size,
    kl_divergence,
    moved,
    parameter_norm,
)

__all__ = [
    "StepSize",
    "accumulate_directions",
    "baseline_examples",
    "find_step_size",
    "fisher_norm_ratio",
    "kl_divergence",
    "lift_weights",
    "moved",
    "parameter_norm",
    "random_direction",
    "top_examples",
    "zero_directions",
]
