"""One natural-gradient step as a method of repair.py, with the exact kind of the stage `step`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from npeff.directions import parameter_norm
from npeff.execution.serial import SerialExecutor
from npeff.models.loaded import LoadedModel
from npeff.models.loss_gradient import loss_gradient
from npeff.models.predictions import kl_divergence
from npeff.runs.progress import SilentProgress
from npeff.stages.step.fisher_rows import RunRows, preconditioner
from npeff.store.splits import Splits
from npeff.store.tables import read_table
from npeff.verification import find_step_size
from numpy.typing import NDArray
from torch import Tensor, nn

from repair_stage.problems import Prepared, Tuning

TRIALS = ((0.01, 0.1, 5), (0.01, 0.3, 5), (0.1, 0.3, 5), (0.1, 1.0, 5), (0.1, 0.3, 1), (1.0, 0.3, 1))
"""Damping, mean KL divergence of the step on the training part, and weight of the right predictions in the loss."""
FEW_TRIALS = ((0.1, 0.03, 5), (0.1, 0.1, 5), (0.1, 0.3, 5))
"""Those of a problem with few trials. They need one direction."""


def stepped(
    prepared: Prepared, tuning: Tuning, batch_size: int, few_trials: bool
) -> Iterator[tuple[dict[str, Any], nn.Module]]:
    """Take one step with the Fisher of all fitted examples, and the gradient of the training part."""
    run, loaded = prepared.runs["whitened"], prepared.loaded
    fit_N = Splits.of(read_table(run.table("examples"), "examples")).fit_N
    rows = RunRows(run, SerialExecutor(), fit_N, SilentProgress())
    before, found = _logits(loaded, loaded.model, tuning.train, batch_size), {}
    for damping, kl, weight in FEW_TRIALS if few_trials else TRIALS:
        if (damping, weight) not in found:
            made = preconditioner(rows, "exact", damping, 16, 0.01, 200)
            found[damping, weight] = made.precondition(_gradient(prepared, tuning.train, weight, batch_size, rows))
        direction = found[damping, weight]
        length = sum(float(value.double().square().sum()) for value in direction.values()) ** 0.5
        model = copy.deepcopy(loaded.model)

        def kl_at(step: float, direction: dict[str, Tensor] = direction, model: nn.Module = model) -> float:
            _move(loaded.model, model, direction, step)
            return float(kl_divergence(_logits(loaded, model, tuning.train, batch_size), before).mean())

        size = find_step_size(kl_at, kl, longest=parameter_norm(loaded.model, direction) / length)
        _move(loaded.model, model, direction, size.epsilon)
        settings = {"damping": damping, "kl": kl, "weight_of_right": weight}
        yield settings | {"step": size.epsilon, "reached": size.reached_target}, model


@torch.no_grad()
def _move(original: nn.Module, model: nn.Module, direction: dict[str, Tensor], step: float) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, value in direction.items():
        parameters[name].copy_(original.get_parameter(name) - step * value)


def _gradient(
    prepared: Prepared, examples: NDArray[np.int64], weight: float, batch_size: int, rows: RunRows
) -> dict[str, Tensor]:
    loaded, total = prepared.loaded, dict[str, Tensor]()
    weights_n = np.where(prepared.wrong_N[examples], 1.0, weight)
    weight_of = dict(zip(examples.tolist(), (weights_n / weights_n.sum()).tolist(), strict=True))
    for numbers in loaded.batches(examples.tolist(), batch_size):
        batch, targets = loaded.with_targets(numbers)
        weights = [weight_of[number] for number in numbers]
        _, part = loss_gradient(loaded, batch, targets, weights, rows.shapes)
        total = {name: total[name] + part[name] for name in part} if total else part
    return total


@torch.no_grad()
def _logits(loaded: LoadedModel, model: nn.Module, examples: NDArray[np.int64], batch_size: int) -> Tensor:
    return torch.cat(
        [loaded.logits(model, loaded.batch(numbers)) for numbers in loaded.batches(examples.tolist(), batch_size)]
    )
