"""The worker of the stage `step`: the gradient of the loss, and the model after steps of several sizes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.directions import parameter_norm
from npeff.models.loaded import ModelSpec
from npeff.models.loss_gradient import loss_gradient
from npeff.models.predictions import Predictions
from npeff.runs.errors import RunDirectoryError
from npeff.stages.edited_model import write_edited_model
from npeff.storage.checksums import write_json_atomically
from npeff.store.array_files import read_arrays
from npeff.verification import find_step_size, moved


@dataclass(frozen=True)
class Size:
    """An item: a step of a given size, or of the size that reaches a mean KL divergence."""

    number: int
    step: float | None
    kl: float | None


class StepWorker:
    """Computes gradients, and evaluates steps.

    Args:
        model: the run's model.
        results: folder of the direction and of one JSON file for each step size.
        examples_n: numbers of the labelled examples.
        classes_n: their labels.
        batch_size: batch size of the predictions.
        gradient_batch_size: batch size of the gradients.
        lineage: what the results are made from, see `npeff.runs.lineage`.
    """

    def __init__(
        self,
        model: ModelSpec,
        results: Path,
        examples_n: NDArray[np.int64],
        classes_n: NDArray[np.int64],
        batch_size: int,
        gradient_batch_size: int,
        lineage: str | None,
    ) -> None:
        self._loaded, self._results, self._lineage = model.load(), results, lineage
        self._examples_n, self._class_of = examples_n, dict(zip(examples_n.tolist(), classes_n.tolist(), strict=True))
        self._classes_n = torch.from_numpy(classes_n)
        self._batch_size, self._gradient_batch_size = batch_size, gradient_batch_size

    def gradient(self, part: tuple[int, tuple[int, ...]]) -> tuple[float, dict[str, Tensor]]:
        """Return the part of some labelled examples in the mean loss and in its gradient."""
        total, gradients = 0.0, dict[str, Tensor]()
        for chosen in self._loaded.batches(part[1], self._gradient_batch_size):
            targets = torch.tensor([self._class_of[number] for number in chosen], device=self._loaded.device)
            weights = [1 / len(self._examples_n)] * len(chosen)
            loss, found = loss_gradient(
                self._loaded, self._loaded.batch(chosen), targets, weights, self._loaded.layout.names
            )
            total += loss
            for name, value in found.items():  # sums of half precision are in float32
                wide = value.to(torch.promote_types(value.dtype, torch.float32))
                gradients[name] = gradients[name] + wide if name in gradients else wide
        return total, {name: value.cpu() for name, value in gradients.items()}

    def trial(self, size: Size) -> dict[str, Any]:
        """Return the step size, its mean KL divergence, loss and right predictions, and store them in a file.

        If no step of at most the norm of the parameters reaches the KL divergence, the step size is None.
        """
        direction, before, step = self._direction, self._unedited, size.step
        length = _length(direction)
        if not 0 < length < math.inf:
            raise RunDirectoryError(
                f"the natural gradient has the length {length:g} in the precision of the model: use another damping"
            )
        longest = parameter_norm(self._loaded.model, direction) / length
        if step is None:
            assert size.kl is not None
            found = find_step_size(lambda step: self._kl(before, step), size.kl, longest=longest)
            step = found.epsilon if found.reached_target else None
        trial: dict[str, Any] = {"step": step, "lineage": self._lineage}
        if step is not None:
            with self._stepped(step):
                after = self._predict()
            kl = float(after.kl(before).mean())
            if not math.isfinite(kl):
                raise RunDirectoryError(f"the logits after a step of {step:g} are not finite: use a smaller step_size")
            trial |= {"kl": kl, **self._scores(after)}
        write_json_atomically(self._results / f"trial-{size.number:03d}.json", trial)
        return trial

    def unedited(self, item: None) -> dict[str, Any]:
        """Return the loss and the right predictions of the model of the run."""
        return self._scores(self._unedited)

    def judge(self, wanted: tuple[float, NDArray[np.int64]]) -> list[list[bool]]:
        """Return whether each held-out example is predicted correctly, before and after the step."""
        step, examples = wanted
        before = self._loaded.predict(examples.tolist(), self._batch_size).correct()
        with self._stepped(step):
            after = self._loaded.predict(examples.tolist(), self._batch_size).correct()
        return [before.tolist(), after.tolist()]

    def save(self, wanted: tuple[float, Path, dict[str, Any]]) -> str:
        """Write the edited model and the record of the step to a folder. Returns the checksum of the model's file."""
        step, folder, record = wanted
        with self._stepped(step):
            return write_edited_model(self._loaded.model, folder, "step", record)

    def _kl(self, before: Predictions, step: float) -> float:
        with self._stepped(step):
            return float(self._predict().kl(before).mean())

    def _stepped(self, step: float) -> AbstractContextManager[None]:
        return moved(self._loaded.model, self._direction, -step)

    @cached_property
    def _unedited(self) -> Predictions:
        """The predictions before a step. They must not be computed inside `_stepped`."""
        return self._predict()

    def _predict(self) -> Predictions:
        return self._loaded.predict(self._examples_n.tolist(), self._batch_size)

    def _scores(self, predictions: Predictions) -> dict[str, Any]:
        assert isinstance(predictions.logits, Tensor), "one prediction for each example"
        logits_nC = predictions.logits[:, 0]
        right = logits_nC.argmax(-1) == self._classes_n
        loss = float(torch.nn.functional.cross_entropy(logits_nC.double(), self._classes_n))
        return {"loss": loss if math.isfinite(loss) else None, "correct": right.nonzero()[:, 0].tolist()}

    @cached_property
    def _direction(self) -> dict[str, Tensor]:
        arrays, _ = read_arrays(self._results / "direction.safetensors")
        return {name: torch.from_numpy(values) for name, values in arrays.items()}


def _length(direction: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in direction.values()))
