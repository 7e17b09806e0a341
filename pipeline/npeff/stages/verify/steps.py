"""Steps of the model along directions, and their effects on the examples of a component."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from npeff.directions import parameter_norm
from npeff.stages.verify.examples import Answers, Effects, Groups, Model, Parts, Predicted, with_classes_of
from npeff.stages.verify.options import VerificationOptions
from npeff.statistics.ratio_intervals import LEAST_KL
from npeff.verification import Linearized, StepSize, find_step_size, moved
from npeff.verification.step_size import MAX_EVALUATIONS, RELATIVE_TOLERANCE

FAST_TOLERANCE = 0.15
"""Relative tolerance of the mean KL divergence on the top examples, if it is not `exact`. A KL ratio depends little on
the length of the step: an error of 15% of the KL changes the ratio by 3%."""

_FAST_EVALUATIONS = 8
_SMALL = 0.25
"""Mean KL divergence of a small step, as a fraction of the target, up to which the KL is extrapolated as quadratic."""
_TO_SMALL = 0.04
"""The same fraction that a step is shortened to, if it is not small."""
_SIGN_STEP = 0.1
"""Length of the step that determines the informative sign, as a fraction of the step with the target KL."""

Direction = Mapping[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """A direction in parameter space with its predicted effects on all examples, if the sketches predict them."""

    direction: Direction
    predicted: Predicted | None


@dataclass(frozen=True)
class Control:
    """The effect of a control. `measured` are KL divergences by passes that check predicted ones."""

    epsilon: float
    kl: Effects
    checked: Effects | None = None


@dataclass(frozen=True)
class Tested:
    """The effects of a step along a component's direction, and of the controls."""

    step: StepSize
    target_kl: float | None
    """The mean KL divergence that the step should reach; None for a step of fixed length."""
    kl: Effects
    before: Answers
    after: Answers
    controls: dict[str, Control]
    evidence: Effects | None
    """‖A g‖² of the examples, from the stored sketches."""


class Steps:
    """Moves the model, and predicts the effects of moves.

    Args:
        module: The module to move.
        model: The model that answers.
        options: The options of the verification.
        predict: Whether effects are predicted where they can be.
    """

    def __init__(self, module: nn.Module, model: Model, options: VerificationOptions, predict: bool) -> None:
        self._module, self._model, self._options, self._predict = module, model, options, predict

    def unmoved(self, groups: Groups) -> Answers:
        """Return the predictions of the unmoved model on all examples of a component in a split."""
        return self._model.unmoved_answers(groups.parts)

    def test(
        self,
        own: Probe,
        sign: int,
        groups: Groups,
        before: Answers,
        controls: Mapping[str, Probe],
        check: bool = False,
        informative: Tested | None = None,
    ) -> Tested:
        """Test the step of one sign along a component's direction.

        Args:
            own: The direction.
            sign: The sign of the step.
            groups: The examples.
            before: The predictions of the unmoved model on them.
            controls: The directions of the controls by name.
            check: Whether to measure the predicted effects, too.
            informative: The result of the sign that lowers the confidence; None for this sign itself. The target of the
                other sign is at most half of the mean of −log p, which is the largest KL that more confidence can
                cause. If effects are predicted, only its top examples and its matched baseline are measured.
        """
        target = None
        if self._options.epsilon is None:
            target = self._options.target_kl
            if informative is not None:
                top = before.of(groups.top)
                target = min(target, -0.5 * float(np.nanmean(top.log_confidence(top))))
        step, after = self._search(own, sign, target, groups.parts[0], before)
        partly = self._predict and informative is not None
        with moved(self._module, own.direction, sign * step.epsilon):
            after = self._model.answers(groups.parts[1 : 2 if partly else None], after)
        found = {
            name: self._control(probe, sign, step, target, groups, before, check)
            if informative is None or not self._predict or probe.predicted is not None
            else _extrapolated(informative.controls[name], informative.target_kl, target)
            for name, probe in controls.items()
        }
        compared, evidence = groups.compared, None
        if own.predicted is not None:
            evidence = Effects(compared, own.predicted.of(compared).evidence_n)
        return Tested(step, target, _kl(before, after), before, after, found, evidence)

    def ablated(self, probe: Probe, step: float, groups: Groups, before: Answers) -> Tested:
        """Return the effect of a step of a given length, with its sign, on all examples of a component."""
        with moved(self._module, probe.direction, step):
            after = self._model.answers(groups.parts)
        kl = _kl(before, after)
        mean = float(np.nanmean(kl.of(groups.top)))
        return Tested(StepSize(abs(step), mean, math.isfinite(mean)), None, kl, before, after, {}, None)

    def after_removal(
        self, removed: Direction, own: Probe, step: float | None, groups: Groups, before: Answers
    ) -> tuple[Effects, Effects | None]:
        """Remove a part of the parameters, and then take a step along a component's direction.

        Args:
            removed: The part that is subtracted from the parameters.
            own: The direction.
            step: The step, with its sign; None for no step.
            groups: The examples, of which the top examples and their matched baseline are measured.
            before: The predictions of the unmoved model.

        Returns:
            The KL divergences of the removal, and those of the step after the removal.
        """
        parts = groups.parts[:2]
        with moved(self._module, removed, -1.0):
            after = self._model.answers(parts)
            found = None if step is None else self.measured_kl(own.direction, step, after, parts)
        return _kl(before, after), found

    def informative_sign(self, own: Probe, top: NDArray[np.int64]) -> int:
        """Return the sign of the step that lowers the mean log p of the predicted classes on distinct examples.

        The stored sketches give the derivative if the change of the logits is known. Otherwise, a short step does.
        """
        if not len(top):
            return 1
        if own.predicted is not None and self._predict:
            slope = own.predicted.of(top).confidence_slope()
            if slope is not None:
                return -1 if slope > 0 else 1
        before = self._model.unmoved_answers([top])
        target = self._options.target_kl if self._options.epsilon is None else None
        step, _ = self._search(own, 1, target, top, before)
        with moved(self._module, own.direction, _SIGN_STEP * step.epsilon):
            after = self._model.answers([top]).predictions
        change = after.log_confidence(before.predictions) - before.predictions.log_confidence(before.predictions)
        return -1 if float(np.nanmean(change)) > 0 else 1

    def measured_kl(self, direction: Direction, step: float, before: Answers, parts: Parts) -> Effects:
        """Measure the KL divergences of a step, with its sign, on parts of the examples of ``before``."""
        with moved(self._module, direction, step):
            return _kl(before, self._model.answers(parts))

    def _search(
        self, probe: Probe, sign: int, target: float | None, top: NDArray[np.int64], before: Answers
    ) -> tuple[StepSize, Answers]:
        """Find the step with the target KL on the top examples (ascending), and the predictions after it on these.

        Without a target, the step has the fixed length.
        """
        unmoved = before.of(top)
        after = Answers(top, unmoved)

        def kl_at(epsilon: float) -> float:
            nonlocal after
            with moved(self._module, probe.direction, sign * epsilon):
                after = self._model.answers([top])
            return float(np.nanmean(after.predictions.kl(unmoved)))

        if target is None:
            assert self._options.epsilon is not None
            kl = kl_at(self._options.epsilon)
            return StepSize(self._options.epsilon, kl, math.isfinite(kl)), after
        if not target > LEAST_KL:
            return StepSize(0.0, 0.0, False), after
        longest = parameter_norm(self._module, probe.direction)
        found = find_step_size(
            kl_at,
            target,
            longest=longest,
            first=None if probe.predicted is None else _predicted_step(probe.predicted.of(top), sign, target, longest),
            tolerance=FAST_TOLERANCE if self._predict else RELATIVE_TOLERANCE,
            max_evaluations=_FAST_EVALUATIONS if self._predict else MAX_EVALUATIONS,
        )
        return found, after

    def _control(
        self,
        probe: Probe,
        sign: int,
        step: StepSize,
        target: float | None,
        groups: Groups,
        before: Answers,
        check: bool,
    ) -> Control:
        """Return the effect of a control: a step with the target KL on the top examples, or with the fixed length."""
        parts = groups.parts[:2]
        if not self._predict:
            found, after = self._search(probe, sign, target, groups.parts[0], before)
            with moved(self._module, probe.direction, sign * found.epsilon):
                after = self._model.answers(groups.parts[1:2], after)
            return Control(found.epsilon, _kl(before, after))
        if probe.predicted is None:
            return self._small_step(probe, sign, step.epsilon, target, before, parts)
        epsilon = self._options.epsilon
        if target is not None:
            longest = parameter_norm(self._module, probe.direction)
            epsilon = _predicted_step(probe.predicted.of(groups.parts[0]), sign, target, longest)
        if epsilon is None:
            return Control(math.nan, Effects(np.empty(0, np.int64), np.empty(0)))
        checked = self.measured_kl(probe.direction, sign * epsilon, before, parts) if check else None
        return Control(epsilon, probe.predicted.kl(sign * epsilon, groups.compared), checked)

    def _small_step(
        self, probe: Probe, sign: int, epsilon: float, target: float | None, before: Answers, parts: Parts
    ) -> Control:
        """Measure a control by one small step, and extrapolate its KL divergences to the target as quadratic."""
        kl = self.measured_kl(probe.direction, sign * epsilon, before, parts)
        if target is None:
            return Control(epsilon, kl)
        mean = float(np.nanmean(kl.of(parts[0])))
        if mean > _SMALL * target:
            epsilon *= math.sqrt(_TO_SMALL * target / mean) if math.isfinite(mean) else _SIGN_STEP
            kl = self.measured_kl(probe.direction, sign * epsilon, before, parts)
            mean = float(np.nanmean(kl.of(parts[0])))
        return _extrapolated(Control(epsilon, kl), mean, target)


def _predicted_step(effect: Linearized, sign: int, target: float, longest: float) -> float | None:
    """Predict the step size with the target KL on the examples of an effect; None if it changes no prediction."""
    evidence = float(np.nanmean(effect.evidence_n))
    if not evidence > 0:
        return None
    first = math.sqrt(2 * target / evidence)
    found = find_step_size(
        lambda epsilon: float(np.nanmean(effect.kl(sign * epsilon))), target, longest=longest, first=first
    )
    return found.epsilon if found.reached_target else min(first, longest)


def _extrapolated(control: Control, mean: float | None, target: float | None) -> Control:
    """Extrapolate KL divergences with this mean on the top examples to a target, as quadratic in the step."""
    if mean is None or target is None:
        return control
    if not 0 < mean < math.inf:
        return Control(math.nan, replace(control.kl, values_u=np.full(len(control.kl.values_u), math.nan)))
    values_u = control.kl.values_u * (target / mean)
    return Control(control.epsilon * math.sqrt(max(target, 0.0) / mean), replace(control.kl, values_u=values_u))


def _kl(before: Answers, after: Answers) -> Effects:
    """Return the KL divergences on the examples of ``after``."""
    moved_predictions = after.predictions
    unmoved = with_classes_of(before.of(after.examples_u), moved_predictions)
    return Effects(after.examples_u, moved_predictions.kl(unmoved))
