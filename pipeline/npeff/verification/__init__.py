"""Tests of components on the model: perturbations along directions, controls and repair."""

from __future__ import annotations

from npeff.verification.controls import another_component, baseline_examples, random_direction, top_examples
from npeff.verification.linearized import Linearized
from npeff.verification.matching import Matches, matched_examples
from npeff.verification.perturbation import moved
from npeff.verification.prediction_shifts import Shifts, shifts
from npeff.verification.repair import (
    Edit,
    OverRepresentation,
    RepairCandidate,
    choose_step,
    joint_steps,
    over_represented,
)
from npeff.verification.step_size import StepSize, find_step_size

__all__ = [
    "Edit",
    "Linearized",
    "Matches",
    "OverRepresentation",
    "RepairCandidate",
    "Shifts",
    "StepSize",
    "another_component",
    "baseline_examples",
    "choose_step",
    "find_step_size",
    "joint_steps",
    "matched_examples",
    "moved",
    "over_represented",
    "random_direction",
    "shifts",
    "top_examples",
]
