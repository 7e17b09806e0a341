"""The tables of a run, and which stage writes each."""

from __future__ import annotations

LABEL = "label"
"""The command that writes `label_scores`. It is no stage: its results have no record, and nothing depends on them."""

WRITTEN_BY = {
    "examples": "fishers",
    "classes": "fishers",
    "parameters": "fishers",
    "spectrum": "spectrum",
    "spectrum_statistics": "spectrum",
    "components": "factorize",
    "top_examples": "factorize",
    "coefficients": "factorize",
    "history": "factorize",
    "step": "step",
    "selection": "select",
    "selection_fits": "select",
    "layer_energy": "lift",
    "verification": "verify",
    "prediction_shifts": "verify",
    "example_shifts": "verify",
    "selectivity": "verify",
    "ablation": "verify",
    "joint_ablation": "verify",
    "position_shares": "attribute",
    "label_scores": LABEL,
    "inputs": "inputs",
    "input_shares": "inputs",
    "input_groups": "inputs",
    "faithfulness_scores": "inputs",
    "faithfulness": "inputs",
    "repair": "repair",
    "repair_steps": "repair",
    "paths": "scale",
    "scales": "scale",
    "morphs": "scale",
}
"""Table name to the stage that writes the table, in the order of the stages."""

OF_THE_RUN = frozenset({"fishers", "spectrum", "select", "step", "diagonal"})
"""The stages, and the part ``diagonal`` of the stage ``fishers``, whose results all factorizations of a run share."""
