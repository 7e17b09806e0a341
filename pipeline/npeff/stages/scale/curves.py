"""Curves of inputs of a run's model: straight lines between examples, and stimuli whose parameter changes.

Legend: n points, P positions, F features of a position, T predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.input_fisher.path import Curve, Logits, straight
from npeff.input_fisher.velocity import change_along
from npeff.models.loaded import LoadedModel
from npeff.tasks import IGNORED, TaskError, to_device

_STEP = 1 / 256
"""Distance of the positions at which a stimulus is computed for its derivative."""
_NODES = 5


class Curves:
    """The curves of one run.

    Args:
        loaded: The model and the examples.
        along: The stimulus parameter; None for straight lines.
    """

    def __init__(self, loaded: LoadedModel, along: str | None) -> None:
        self._loaded, self._along = loaded, along
        self.signature = cache(self._signature)

    def of(self, start: int, end: int | None, direction: Mapping[str, Tensor] | None = None) -> Curve:
        """Return the curve from one example to another, or along the stimulus parameter if ``end`` is None.

        Args:
            start: The example at s = 0.
            end: The example at s = 1.
            direction: Direction of the parameters whose share of the path is wanted.
        """
        logits = self._logits(start)
        model = self._loaded.single_precision_model
        change = None if direction is None else change_along(model, direction, logits)
        if end is None:
            return Curve(lambda s_n: self._stimulus_points(start, s_n), logits, self._made(start), change)
        first, second = (self._flat([example]) for example in (start, end))
        last_PF = torch.where(first.used_BP[0, :, None], second.values_BPF[0], first.values_BPF[0])
        return Curve(straight(first.values_BPF[0], last_PF), logits, self._made(start), change)

    def image_shape(self, example: int) -> tuple[int, int, int] | None:
        """Return the height, width and number of channels if the inputs of an example are an image, otherwise None."""
        inputs = self._loaded.inputs(self._batch([example]))
        if inputs.values.dim() != 4 or inputs.positions != (2, 3):
            return None
        _, channels, height, width = inputs.values.shape
        return height, width, channels

    def are_between_texts(self, example: int) -> bool:
        """Return whether the curves are straight lines between embedded tokens, from the inputs of an example."""
        if self._along is not None or not self._loaded.inputs(self._batch([example])).exchangeable:
            return False
        return self._loaded.input_tokens([example]) is not None

    def connects(self, start: int, end: int) -> bool:
        """Return whether the straight line from one example leads to the other: whether the logits at its end are
        those of the other example.

        They are not if the model has further inputs that differ, such as the segments of a pair of texts.
        """
        curve, inputs = self.of(start, end), self._flat([end])
        values, _ = curve.points(np.array([1.0]))
        with torch.no_grad():
            found, expected = curve.logits(values), inputs.logits(inputs.values_BPF)
        if found.shape != expected.shape:
            return False
        difference = torch.where(expected.isfinite(), (found - expected).abs(), 0.0).max()
        scale = torch.where(expected.isfinite(), expected.abs(), 0.0).max()
        return bool(difference <= torch.finfo(expected.dtype).eps ** 0.5 * scale.clamp_min(1e-6))

    def check(self, start: int, end: int) -> None:
        """Check that a straight line can connect two examples.

        Raises:
            TaskError: It cannot.
        """
        names = [repr(str(self._loaded.table()["id"][example])) for example in (start, end)]
        where = f"task {self._loaded.spec.task!r}: a straight line cannot connect the examples {' and '.join(names)}"
        if self.signature(start) != self.signature(end):
            raise TaskError(
                f"{where}, because their inputs have different lengths: choose examples with the same number of tokens "
                "in scale.pairs, or give a number of random pairs"
            )
        if not self.connects(start, end):
            raise TaskError(
                f"{where}, because the model has further inputs that differ, such as the segments of a pair of texts: "
                "choose others in scale.pairs, or give a number of random pairs"
            )

    def check_stimulus(self, example: int) -> None:
        """Check that an example has the stimulus parameter, with as many inputs at every level.

        Raises:
            TaskError: It has not.
        """
        spec, where = self._loaded.spec, "examples().stimulus"
        values, derivatives = self._stimulus_points(example, np.array([0.0, 0.5, 1.0]))
        if not (bool(values.isfinite().all()) and bool(derivatives.isfinite().all())):
            raise TaskError(f"task {spec.task!r}: {where}({self._along!r}) returns inputs that are not finite")

    def _signature(self, example: int) -> Hashable:
        """Return what the inputs of two examples must have in common for a straight line."""
        flat, made_T = self._flat([example]), self._made(example)
        made = None if made_T is None else bytes(made_T.cpu().numpy())
        return tuple(flat.values_BPF.shape), bytes(flat.used_BP.cpu().numpy()), made

    def _made(self, example: int) -> Tensor | None:
        """Return which predictions of an example count; None if it has a single one."""
        _, targets = self._loaded.one(example)
        return targets[0] != IGNORED if targets.dim() == 2 else None

    def _batch(self, examples: list[int]) -> Any:
        """Return a batch of examples, at the first level of the stimulus parameter if there is one."""
        return self._loaded.batch(examples) if self._along is None else self._stimuli(examples, [0.0] * len(examples))

    def _flat(self, examples: list[int]) -> FlatInputs:
        return self._loaded.flat_inputs(self._batch(examples), len(examples))

    def _logits(self, example: int) -> Logits:
        """Return the logits as a function of inputs (n, P, F), with all else as in the example."""
        of_n: Callable[[int], FlatInputs] = cache(lambda n: self._flat([example] * n))

        def logits(values_nPF: Tensor) -> Tensor:
            return of_n(len(values_nPF)).logits(values_nPF)

        return logits

    def _stimuli(self, examples: list[int], s: list[float]) -> Any:
        spec = self._loaded.spec
        assert self._along is not None
        with spec.user_code(self._loaded.task, "examples().stimulus"):
            batch = self._loaded.examples.stimulus(self._along, s, examples)
        if batch is None:
            raise TaskError(
                f"task {spec.task!r}: the examples have no stimulus parameter {self._along!r}: change scale.along, or "
                "remove it"
            )
        return to_device(batch, self._loaded.device)

    def _stimulus_points(self, example: int, s_n: NDArray[np.float64]) -> tuple[Tensor, Tensor]:
        """Return the stimuli at the positions, and their derivatives by differences of five stimuli."""
        first_n = np.clip(s_n - _STEP * (_NODES // 2), 0.0, 1.0 - _STEP * (_NODES - 1))
        nodes_nk = first_n[:, None] + _STEP * np.arange(_NODES)
        offsets_nk = (nodes_nk - s_n[:, None]) / _STEP
        weights_nk = np.stack([_derivative_weights(offsets_k) for offsets_k in offsets_nk])
        shown = [*s_n.tolist(), *nodes_nk.ravel().tolist()]
        values = self._loaded.flat_inputs(self._stimuli([example] * len(shown), shown), len(shown)).values_BPF
        at, around = values[: len(s_n)], values[len(s_n) :].unflatten(0, nodes_nk.shape)
        weights = torch.from_numpy(weights_nk / _STEP).to(values.device)
        return at, torch.einsum("nk,nkpf->npf", weights, around.double()).to(values.dtype)


def _derivative_weights(offsets_k: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights of values at some offsets that give the derivative at 0, exact for polynomials."""
    powers_kk = np.vander(offsets_k, increasing=True).T
    weights_k: NDArray[np.float64] = np.linalg.solve(powers_kk, np.eye(len(offsets_k))[1])
    return weights_k
