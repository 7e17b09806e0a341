"""The worker of the stage `repair`: move the model along components' directions and evaluate its predictions.

An item is a component: the worker tries steps of both signs and several sizes on the tuning examples, starting from
the model after the earlier edits, and stores the results in a file. For steps along several components at once, an
item is a batch of examples: the worker computes the loss at given steps and the derivatives with respect to the steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.directions import parameter_norm
from npeff.models.loaded import ModelSpec
from npeff.models.loss_gradient import loss_gradient
from npeff.models.predictions import Predictions
from npeff.stages.edited_model import write_edited_model
from npeff.stages.repair.directions import RepairDirections
from npeff.storage.checksums import write_json_atomically
from npeff.store.direction_store import DirectionStore
from npeff.verification import Edit, find_step_size, moved


@dataclass(frozen=True)
class Attempt:
    """An item: steps along a component's direction, after the edits."""

    edits: tuple[Edit, ...]
    component: int
    top: NDArray[np.int64]
    """Top examples, whose mean KL divergence determines the length of a step."""

    @property
    def file(self) -> str:
        return f"{len(self.edits):03d}-{self.component:05d}.json"


@dataclass(frozen=True)
class Trial:
    """The result of one step."""

    sign: int
    length: float
    kl: float
    """Mean KL divergence over the top examples."""
    correct: list[int]
    """Tuning examples that are predicted correctly after the step, as positions among the tuning examples."""


@dataclass(frozen=True, eq=False)
class Batch:
    """An item: examples whose weighted loss is computed at the edits."""

    edits: tuple[Edit, ...]
    examples: NDArray[np.int64]
    weights: NDArray[np.float64]


class RepairWorker:
    """Tries and evaluates edits of the model.

    Args:
        model: the run's model.
        directions: path of the run's `DirectionStore`.
        results: folder of one JSON file per finished attempt.
        tuning: numbers of the tuning examples, on which steps are chosen.
        kl_steps: mean KL divergences on the top examples that the steps should reach.
        batch_size: batch size of the predictions.
        checksums: checksums of the directions.
        coefficients_KK: coefficients of own directions, see `npeff.stages.repair.directions`; None for the stored ones.
        lineage: what the results are made from, see `npeff.runs.lineage`.
    """

    def __init__(
        self,
        model: ModelSpec,
        directions: Path,
        results: Path,
        tuning: NDArray[np.int64],
        kl_steps: Sequence[float],
        batch_size: int,
        checksums: Mapping[int, str] | None = None,
        coefficients_KK: NDArray[np.float64] | None = None,
        lineage: str | None = None,
    ) -> None:
        self._loaded = model.load()
        self._directions = RepairDirections(DirectionStore.open(directions, checksums), coefficients_KK)
        self._results, self._lineage = results, lineage
        self._tuning, self._kl_steps, self._batch_size = tuning, kl_steps, batch_size

    def attempt(self, wanted: Attempt) -> list[dict[str, Any]]:
        """Return a `Trial`, as a dictionary, for each sign and target KL divergence, and store them in a file."""
        direction = self._directions.of(wanted.component)
        trials: list[dict[str, Any]] = []
        with self._edited(wanted.edits):
            before, longest = self._predict(wanted.top), parameter_norm(self._loaded.model, direction)

            for sign in (1, -1):

                def kl_at(length: float, sign: int = sign) -> float:
                    with moved(self._loaded.model, direction, sign * length):
                        return float(np.nanmean(self._predict(wanted.top).kl(before)))

                for target in self._kl_steps:
                    step = find_step_size(kl_at, target, longest=longest)
                    if not step.reached_target:
                        break  # larger targets cannot be reached either
                    with moved(self._loaded.model, direction, sign * step.epsilon):
                        correct = np.flatnonzero(self._predict(self._tuning).correct()).tolist()
                    trials.append(asdict(Trial(sign, step.epsilon, step.kl, correct)))
        write_json_atomically(self._results / wanted.file, {"trials": trials, "lineage": self._lineage})
        return trials

    def loss_and_derivatives(self, wanted: Batch) -> tuple[float, list[float]]:
        """Return Σ_i w_i · (−log p(label_i)) at the edits, and its derivatives with respect to the edits' steps."""
        weight_of = dict(zip(wanted.examples.tolist(), wanted.weights.tolist(), strict=True))
        total, gradients = 0.0, dict[str, torch.Tensor]()
        with self._edited(wanted.edits):
            for chosen in self._loaded.batches(wanted.examples.tolist(), self._batch_size):
                loss, found = self._gradient(chosen, [weight_of[index] for index in chosen])
                total += loss
                gradients = {name: gradients[name] + found[name] for name in found} if gradients else found
        return total, self._directions.products(gradients, [edit.component for edit in wanted.edits])

    def right_after(self, edits: tuple[Edit, ...]) -> list[int]:
        """Return the tuning examples that are predicted correctly after the edits, as positions among them."""
        with self._edited(edits):
            places: list[int] = np.flatnonzero(self._predict(self._tuning).correct()).tolist()
        return places

    def judge(self, wanted: tuple[tuple[Edit, ...], NDArray[np.int64]]) -> list[list[bool]]:
        """Return whether each example is predicted correctly, before and after the edits."""
        edits, examples = wanted
        before = self._predict(examples).correct()
        with self._edited(edits):
            return [before.tolist(), self._predict(examples).correct().tolist()]

    def save(self, wanted: tuple[tuple[Edit, ...], Path, dict[str, Any]]) -> str:
        """Write the edited model and the record of the edits to a folder. Returns the checksum of the model's file."""
        edits, folder, record = wanted
        with self._edited(edits):
            return write_edited_model(self._loaded.model, folder, "repair", record)

    @contextmanager
    def _edited(self, edits: Sequence[Edit]) -> Iterator[None]:
        with moved(self._loaded.model, self._directions.sum(edits), 1.0):
            yield

    def _gradient(self, chosen: list[int], weights: list[float]) -> tuple[float, dict[str, torch.Tensor]]:
        batch, targets = self._loaded.with_targets(chosen)
        return loss_gradient(self._loaded, batch, targets, weights, self._directions.parameters)

    def _predict(self, examples: NDArray[np.int64]) -> Predictions:
        return self._loaded.predict(examples.tolist(), self._batch_size)
