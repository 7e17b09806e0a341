"""Components tested on the model: directions in parameter space, perturbations along them, and controls."""

from __future__ import annotations

from pipeline.verification.attribution import PositionShares, position_shares
from pipeline.verification.confidence import Confidence, Measured, confidence, rank_correlation
from pipeline.verification.controls import another_component, baseline_examples, random_direction, top_examples
from pipeline.verification.diagonal_lift import (
    accumulate_diagonals,
    diagonal_weights,
    fisher_weighted,
    principal_direction,
    sign_weights,
)
from pipeline.verification.lift import (
    accumulate_directions,
    cosine,
    lift_weights,
    polish_weights,
    row_products,
    zero_directions,
)
from pipeline.verification.perturbation import (
    StepSize,
    displacement,
    find_step_size,
    inner_product,
    kl_divergence,
    moved,
    orthogonalized,
    parameter_norm,
)
from pipeline.verification.repair import (
    Edit,
    McNemar,
    OverRepresentation,
    RepairCandidate,
    choose_step,
    joint_steps,
    mcnemar,
    over_represented,
)

__all__ = [
    "Confidence",
    "Edit",
    "McNemar",
    "Measured",
    "OverRepresentation",
    "PositionShares",
    "RepairCandidate",
    "StepSize",
    "accumulate_diagonals",
    "accumulate_directions",
    "another_component",
    "baseline_examples",
    "choose_step",
    "confidence",
    "cosine",
    "diagonal_weights",
    "displacement",
    "find_step_size",
    "fisher_weighted",
    "inner_product",
    "joint_steps",
    "kl_divergence",
    "lift_weights",
    "mcnemar",
    "moved",
    "orthogonalized",
    "over_represented",
    "parameter_norm",
    "polish_weights",
    "position_shares",
    "principal_direction",
    "random_direction",
    "rank_correlation",
    "row_products",
    "sign_weights",
    "top_examples",
    "zero_directions",
]
