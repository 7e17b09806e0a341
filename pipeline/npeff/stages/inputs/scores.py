"""Scores of attributions on some examples, by one test for all methods, and their means over the examples.

Legend: B examples of a batch, P positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from npeff.input_fisher.faithfulness import FaithfulnessTest, faithfulness
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.noise import InputNoise, independent
from npeff.input_fisher.opponents import OPPONENTS, Explained
from npeff.input_fisher.predictions import probabilities
from npeff.input_fisher.replacements import GivenTheRest, MeanInput, OtherExamples
from npeff.statistics.paired_bootstrap import mean_interval, paired_difference

OURS = "functional_information"
"""Name of the functional Fisher information among the methods."""
_GIVEN_THE_REST = "given_the_rest"
_MOST_POSITIONS = 4096
"""Largest number of positions whose covariance is factored again for each example, for the last replacement."""


def score_rows(
    inputs: FlatInputs,
    examples: Sequence[int],
    information_BP: Tensor,
    noise: InputNoise,
    others: OtherExamples,
    samples: int,
    steps: int,
) -> dict[int, list[dict[str, Any]]]:
    """Return the rows of the table `faithfulness_scores` for each example of a batch.

    Args:
        inputs: The inputs of the batch.
        examples: The numbers of its examples.
        information_BP: The functional Fisher information at each position.
        noise: The noise of the information. The published attributions use independent noise of the same
            variances.
        others: Examples whose inputs replace those of the batch.
        samples: Number of draws of noise of each example, for all methods.
        steps: Number of steps of the curves.
    """
    with torch.no_grad():
        classes_B = probabilities(inputs, inputs.values_BPF).argmax(1)
    explained = Explained(examples, classes_B, independent(noise), samples=samples, steps=samples, seed=noise.seed)
    attributions = {OURS: information_BP}
    attributions |= {name: opponent.attribution(inputs, explained) for name, opponent in OPPONENTS.items()}
    replacements = {"mean": MeanInput(noise.mean_PF), "resample": others, _GIVEN_THE_REST: GivenTheRest(noise)}
    if "features" in noise.factors and inputs.used_BP.shape[1] > _MOST_POSITIONS:
        del replacements[_GIVEN_THE_REST]
    test = FaithfulnessTest(steps=steps, seed=noise.seed)
    found = faithfulness(inputs, examples, classes_B, attributions, replacements, test)
    rows: dict[int, list[dict[str, Any]]] = {example: [] for example in examples}
    for score, values_B in found.items():
        for row, (example, value) in enumerate(zip(examples, values_B.tolist(), strict=True)):
            n_positions = int(inputs.used_BP[row].sum())
            passes = (
                2 * samples if score.method == OURS else sum(OPPONENTS[score.method].passes(explained, n_positions))
            )
            rows[example].append(
                {
                    "example": example,
                    "method": score.method,
                    "replacement": score.replacement,
                    "metric": score.metric,
                    "score": value,
                    "passes": passes,
                }
            )
    return rows


def mean_scores(scores: pa.Table, seed: int) -> list[dict[str, Any]]:
    """Return the rows of the table `faithfulness`: means of the scores with intervals, and differences from ours."""
    names = (scores[name].to_pylist() for name in ("metric", "replacement", "method"))
    scores_N, passes_N = (scores[name].to_numpy() for name in ("score", "passes"))
    places: dict[tuple[str, str, str], list[int]] = {}
    for place, key in enumerate(zip(*names, strict=True)):
        places.setdefault(key, []).append(place)
    rows = []
    for (metric, replacement, method), at in places.items():
        values_N, ours_N = scores_N[at], scores_N[places[metric, replacement, OURS]]
        mean, difference = mean_interval(values_N, seed=seed), paired_difference(ours_N, values_N, seed=seed)
        is_ours = method == OURS
        rows.append(
            {
                "method": method,
                "replacement": replacement,
                "metric": metric,
                "n_examples": mean.n,
                "mean": mean.mean,
                "low": mean.low,
                "high": mean.high,
                "difference": None if is_ours else difference.mean,
                "difference_low": None if is_ours else difference.low,
                "difference_high": None if is_ours else difference.high,
                "knows_replacement": _knows(method, replacement),
                "passes_per_example": float(passes_N[at].mean()),
            }
        )
    return rows


def _knows(method: str, replacement: str) -> bool:
    """Return whether a method is made from the values that the replacement puts in place of inputs."""
    if method == OURS:
        return replacement == _GIVEN_THE_REST
    return OPPONENTS[method].replacement == replacement
