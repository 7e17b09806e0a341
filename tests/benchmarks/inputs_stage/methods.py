"""The attributions that inputs.py compares: ours, and the published ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from npeff.gradients import LabelSpec
from npeff.input_fisher.attribution import input_information
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.moments import CovarianceKind
from npeff.input_fisher.noise import InputNoise
from npeff.input_fisher.opponents import OPPONENTS, Explained
from torch import Tensor

from inputs_stage.problems import Prepared
from inputs_stage.shapley import NAMES

SPREADS = (0.15, 1.0)

Attribution = Callable[[FlatInputs, Explained], Tensor]


@dataclass(frozen=True)
class Method:
    name: str
    attribution: Attribution
    noise: CovarianceKind | None
    """Covariance of its noise; None for a method without noise."""
    by_class: bool = False
    """Whether the covariance is that of the examples with the predicted class as their label."""
    replacement: str | None = None
    """The replacement that the method knows."""
    signed: bool = False


@dataclass(frozen=True)
class Variant:
    method: str
    spread: float | None


def _information(*, label_free: bool = False, conditional: bool = False) -> Attribution:
    def attribution(inputs: FlatInputs, explained: Explained) -> Tensor:
        assert isinstance(explained.noise, InputNoise)
        return input_information(
            inputs,
            explained.noise,
            explained.examples,
            samples=explained.samples,
            classes_B=None if label_free else explained.classes_B,
            labels=LabelSpec("exact") if label_free else None,
            conditional=conditional,
        ).positions_BP

    return attribution


def _elsewhere(inputs: FlatInputs, explained: Explained) -> Tensor:
    raise AssertionError("computed in the environment of captum")


def _opponent(name: str, of: str, noise: CovarianceKind | None) -> Method:
    opponent = OPPONENTS[of]
    return Method(name, opponent.attribution, noise, replacement=opponent.replacement, signed=opponent.signed)


FI, DIAGONAL, ISOTROPIC, LABEL_FREE = "FI, covariance", "FI, diagonal", "FI, isotropic", "input Fisher, all classes"
SQUARED, VARGRAD = "SmoothGrad²", "VarGrad"
PATH, OCCLUSION = "integrated gradients, mean", "occlusion by the mean"
COVARIANCE_NOISE = ", noise of the covariance"
METHODS = {
    method.name: method
    for method in (
        _opponent("random", "random", None),
        _opponent("gradient", "gradient", None),
        _opponent("gradient × input", "gradient_times_input", None),
        _opponent("integrated gradients, zero", "integrated_gradients_zero", None),
        _opponent(PATH, "integrated_gradients_mean", None),
        _opponent(OCCLUSION, "occlusion", None),
        *(Method(name, _elsewhere, None, replacement=name.split(", ")[1], signed=True) for name in NAMES),
        _opponent("SmoothGrad", "smooth_grad", "isotropic"),
        _opponent("SmoothGrad × input", "smooth_grad_times_input", "isotropic"),
        _opponent(SQUARED, "smooth_grad_squared", "isotropic"),
        _opponent(VARGRAD, "var_grad", "isotropic"),
        _opponent(SQUARED + COVARIANCE_NOISE, "smooth_grad_squared", "full"),
        _opponent(VARGRAD + COVARIANCE_NOISE, "var_grad", "full"),
        Method(ISOTROPIC, _information(), "isotropic"),
        Method(DIAGONAL, _information(), "diagonal"),
        Method(FI, _information(), "full"),
        Method("FI, covariance of the class", _information(), "full", by_class=True),
        Method("FI, split given the rest", _information(conditional=True), "full"),
        Method(LABEL_FREE, _information(label_free=True), "full"),
    )
}
JUDGED = (FI, DIAGONAL, LABEL_FREE)
"""Ours, which are compared in pairs with `RIVALS`."""
RIVALS = (SQUARED, VARGRAD, ISOTROPIC, SQUARED + COVARIANCE_NOISE, PATH, OCCLUSION)


def variants(names: Sequence[str]) -> list[Variant]:
    return [Variant(name, spread) for name in names for spread in ((None,) if METHODS[name].noise is None else SPREADS)]


def attribution(
    made: Prepared, variant: Variant, inputs: FlatInputs, examples: Sequence[int], classes_B: Tensor
) -> Tensor:
    """Return the attributions (B, P) of a batch."""
    method, problem = METHODS[variant.method], made.problem

    def with_noise(noise: InputNoise, inputs: FlatInputs, examples: Sequence[int], classes_B: Tensor) -> Tensor:
        if variant.spread is not None:
            noise = replace(noise, spread=variant.spread)
        explained = Explained(examples, classes_B, noise, samples=problem.samples, steps=problem.steps)
        return method.attribution(inputs, explained)

    if not method.by_class:
        return with_noise(made.noises["full" if method.noise is None else method.noise], inputs, examples, classes_B)
    found_BP = torch.zeros(inputs.used_BP.shape, dtype=torch.float64)
    for label in classes_B.unique().tolist():
        rows = (classes_B == label).nonzero()[:, 0].tolist()
        chosen = [examples[row] for row in rows]
        found_BP[rows] = with_noise(made.class_noises[label], made.inputs(chosen), chosen, classes_B[rows])
    return found_BP
