"""Tests of components on the model: perturbations along directions, controls, repair."""

from __future__ import annotations

from pipeline.verification.controls import another_component, baseline_examples, random_direction, top_examples
from pipeline.verification.perturbation import moved
from pipeline.verification.repair import (
    Edit,
    OverRepresentation,
    RepairCandidate,
    choose_step,
    joint_steps,
    over_represented,
)
from pipeline.verification.step_size import StepSize, find_step_size

__all__ = [
    "Edit",
    "OverRepresentation",
    "RepairCandidate",
    "StepSize",
    "another_component",
    "baseline_examples",
    "choose_step",
    "find_step_size",
    "joint_steps",
    "moved",
    "over_represented",
    "random_direction",
    "top_examples",
]
