"""Scores of all methods on the tested examples, each with the size of its noise that the validation examples choose."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from npeff.input_fisher.faithfulness import Score, faithfulness
from npeff.input_fisher.predictions import probabilities
from npeff.input_fisher.replacements import GivenTheRest, MeanInput, Replacement
from torch import Tensor

from inputs_stage.methods import METHODS, Variant, attribution, variants
from inputs_stage.problems import Prepared, Problem, prepared
from inputs_stage.shapley import NAMES, shapley_values

COLUMNS: dict[str, tuple[str, str, int]] = {
    "deletion, mean": ("deletion", "mean", -1),
    "deletion, resample": ("deletion", "resample", -1),
    "insertion, mean": ("insertion", "mean", 1),
    "insertion, resample": ("insertion", "resample", 1),
    "information, resample": ("information", "resample", 1),
    "information, conditional": ("information", "conditional", 1),
}
"""Metric, replacement, and 1 where a high value is good."""

Values = dict[str, dict[str, list[float]]]
"""By variant, as a text, and column: one number per example."""


def record(problem: Problem, seed: int | None, folder: Path) -> dict[str, Any]:
    """Return what was measured of one model, from a file if it was measured before."""
    file = folder / f"{problem.name}-{seed}.json"
    if file.exists():
        found: dict[str, Any] = json.loads(file.read_text())
        return found
    began = time.process_time()
    made = prepared(problem, seed, folder)
    shapley, shapley_seconds = shapley_values(made, folder)
    missing = {*problem.without, *(set(NAMES) - set(shapley))}
    names = [name for name in METHODS if name not in missing]
    tried, _ = _measured(made, made.validation, variants(names), shapley)
    spreads = {name: {column: _best(tried, name, column) for column in COLUMNS} for name in names}
    used = [
        variant
        for variant in variants(names)
        if variant.spread is None or variant.spread in spreads[variant.method].values()
    ]
    values, seconds = _measured(made, made.tested, used, shapley)
    seconds |= {_key(Variant(name, None)): each for name, each in shapley_seconds.items()}
    found = {
        "ids": [made.ids[example] for example in made.tested],
        "accuracy": made.accuracy,
        "spreads": spreads,
        "values": {
            name: {column: values[_key(Variant(name, spreads[name][column]))][column] for column in COLUMNS}
            for name in names
        },
        "cpu_ms": {name: 1e3 * min(seconds[_key(each)] for each in used if each.method == name) for name in names},
        "cpu_seconds": time.process_time() - began,
    }
    file.write_text(json.dumps(found) + "\n")
    return found


def _key(variant: Variant) -> str:
    return f"{variant.method} | {variant.spread}"


def _best(tried: Values, name: str, column: str) -> float | None:
    """Return the spread with the best mean on the validation examples."""
    sign = COLUMNS[column][2]
    return max(
        (variant.spread for variant in variants([name])),
        key=lambda spread: sign * float(np.nanmean(tried[_key(Variant(name, spread))][column])),
    )


def _measured(
    made: Prepared, examples: Sequence[int], chosen: Sequence[Variant], shapley: dict[str, dict[int, Tensor]]
) -> tuple[Values, dict[str, float]]:
    """Return the scores of the examples, in their order, and the seconds of CPU time of an attribution per example."""
    noise = made.noises["full"]
    replacements: dict[str, Replacement] = {
        "mean": MeanInput(noise.mean_PF),
        "resample": made.others,
        "conditional": GivenTheRest(noise),
    }
    place = {example: number for number, example in enumerate(examples)}
    values: Values = {_key(each): {column: [np.nan] * len(examples) for column in COLUMNS} for each in chosen}
    seconds = dict.fromkeys(map(_key, chosen), 0.0)
    for batch in made.batches(examples):
        inputs = made.inputs(batch)
        with torch.no_grad():
            classes_B = probabilities(inputs, inputs.values_BPF).argmax(1)
        attributions = {}
        for each in chosen:
            began = time.process_time()
            if each.method in shapley:
                attributions[_key(each)] = torch.stack([shapley[each.method][example] for example in batch])
            else:
                attributions[_key(each)] = attribution(made, each, inputs, batch, classes_B)
            seconds[_key(each)] += (time.process_time() - began) / len(examples)
        found = faithfulness(inputs, batch, classes_B, attributions, replacements, made.problem.test)
        for key, columns in values.items():
            for column, (metric, replacement, _) in COLUMNS.items():
                scores_B = found[Score(key, replacement, metric)].tolist()
                for example, score in zip(batch, scores_B, strict=True):
                    columns[column][place[example]] = score
    return values, seconds
