"""The models and examples of inputs.py: which examples are tested, which choose, and which give the covariance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fisher_stage import minilm
from npeff.input_fisher.faithfulness import FaithfulnessTest
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import CovarianceKind, Moments, merged
from npeff.input_fisher.noise import InputNoise, factor_covariance
from npeff.input_fisher.replacements import OtherExamples
from npeff.models.loaded import LoadedModel, ModelSpec
from torch import Tensor

KINDS: tuple[CovarianceKind, ...] = ("full", "diagonal", "isotropic")
RIDGE = 1e-4
FOR_TEXTS = (
    "SmoothGrad",
    "VarGrad, noise of the covariance",
    "FI, covariance of the class",
    "FI, split given the rest",
)
"""Methods that are left out for texts. The last one is the same as FI there, as positions are independent."""


@dataclass(frozen=True)
class Problem:
    """A task, and how much is measured of it."""

    name: str
    task: str
    options: dict[str, Any]
    seeds: tuple[int | None, ...]
    """Option `seed` of the task; None for a task without it."""
    n_tested: int
    n_validation: int
    n_others: int | None
    """Number of further examples for the covariance, the mean and the replacements; None for all that are left. The
    validation examples count among them too."""
    samples: int
    """Draws of noise of a method."""
    steps: int
    """Points of integrated gradients."""
    test: FaithfulnessTest
    batch_size: int
    without: tuple[str, ...] = ()
    """Methods that are left out."""
    standardized: bool = False
    """Whether the columns are divided by their deviation, for all methods. Isotropic noise means nothing otherwise."""


def problems() -> dict[str, Problem]:
    test = FaithfulnessTest()
    found = [
        Problem("digits", "digits", {}, (0, 1, 2), 300, 100, None, 32, 32, test, 100),
        _table("breast-cancer", 150, 60),
        _table("wine", 60, 20),
    ]
    if minilm.available():
        few = FaithfulnessTest(steps=6, fractions=(1 / 8, 1 / 4, 1 / 2), draws=6, curve_draws=1)
        task = minilm.config(Path()).task
        found.append(Problem("minilm", task.name, task.options, (None,), 40, 12, 300, 8, 8, few, 20, without=FOR_TEXTS))
    return {problem.name: problem for problem in found}


def _table(name: str, n_tested: int, n_validation: int) -> Problem:
    options = {"data": f"sklearn:{name}", "train_fraction": 0.4}
    test = FaithfulnessTest()
    return Problem(
        name, "sklearn-table", options, (0, 1, 2), n_tested, n_validation, None, 32, 32, test, 150, standardized=True
    )


@dataclass(frozen=True)
class Prepared:
    """A loaded problem."""

    problem: Problem
    loaded: LoadedModel
    tested: Sequence[int]
    validation: Sequence[int]
    ids: dict[int, str]
    noises: dict[CovarianceKind, InputNoise]
    """With spread 1."""
    class_noises: dict[int, InputNoise]
    """By label, with the full covariance of its examples and spread 1. A ridge makes those of few examples regular."""
    others: OtherExamples
    standard: tuple[Tensor, Tensor] | None
    """Mean and deviation of the columns."""
    accuracy: float

    def inputs(self, examples: Sequence[int]) -> FlatInputs:
        return _standardized(self.loaded.flat_inputs(self.loaded.batch(examples)), self.standard)

    def batches(self, examples: Sequence[int]) -> list[list[int]]:
        return self.loaded.batches(examples, self.problem.batch_size)


def prepared(problem: Problem, seed: int | None, folder: Path) -> Prepared:
    """Train or load the model, divide the examples, and compute the covariances."""
    options = problem.options | ({} if seed is None else {"seed": seed})
    spec = ModelSpec(problem.task, options, folder / f"{problem.name}-{seed}-task", ("*",), (), "cpu")
    spec.prepare()
    loaded = spec.load()
    table = loaded.table()
    order = np.random.default_rng(0).permutation(len(loaded.examples)).tolist()
    tested, rest = order[: problem.n_tested], order[problem.n_tested :]
    if problem.n_others is not None:
        rest = rest[: problem.n_validation + problem.n_others]
    parts = [(loaded.flat_inputs(loaded.batch(batch)), batch) for batch in loaded.batches(rest, problem.batch_size)]
    standard = None
    if problem.standardized:
        moments = merged([Moments.of(inputs, "diagonal") for inputs, _ in parts])
        standard = moments.mean_PF, (moments.products["squares"] / (moments.n - 1)).sqrt()
        parts = [(_standardized(inputs, standard), batch) for inputs, batch in parts]
    noises = {}
    for kind in KINDS:
        moments = merged([Moments.of(inputs, kind) for inputs, _ in parts])
        noises[kind] = InputNoise(moments.mean_PF, factor_covariance(moments, kind, RIDGE), 1.0)
    labels_N, right = loaded.labels_N, 0
    class_noises = {}
    if "FI, covariance of the class" not in problem.without:
        for label in sorted(set(labels_N[rest].tolist())):
            of_class = [example for example in rest if labels_N[example] == label]
            inputs = _standardized(loaded.flat_inputs(loaded.batch(of_class)), standard)
            moments = Moments.of(inputs, "full")
            class_noises[label] = InputNoise(moments.mean_PF, factor_covariance(moments, "full", RIDGE), 1.0)
    for batch in loaded.batches(tested, problem.batch_size):
        logits_BC = loaded.logits(loaded.model, loaded.batch(batch))
        right += int((logits_BC.argmax(1).numpy() == labels_N[batch]).sum())
    return Prepared(
        problem=problem,
        loaded=loaded,
        tested=tested,
        validation=rest[: problem.n_validation],
        ids=dict(enumerate(table["id"].to_pylist())),
        noises=noises,
        class_noises=class_noises,
        others=OtherExamples.of(parts),
        standard=standard,
        accuracy=right / len(tested),
    )


def _standardized(inputs: FlatInputs, standard: tuple[Tensor, Tensor] | None) -> FlatInputs:
    if standard is None:
        return inputs
    mean_PF, deviation_PF = (values.to(inputs.values_BPF) for values in standard)
    return FlatInputs(
        (inputs.values_BPF - mean_PF) / deviation_PF,
        lambda values_BPF: inputs.logits(values_BPF * deviation_PF + mean_PF),
        inputs.used_BP,
        inputs.exchangeable,
    )
