"""A task whose model has permuted weights: a control without what the model has learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from npeff.gradients import select_parameters
from npeff.tasks import Examples, Task, load_task
from torch import Tensor, nn


class PermutedTask(Task):
    """Another task, with the entries of each selected parameter permuted.

    Every tensor keeps its values, and therefore its norm and its distribution.

    Args:
        task: Name of the other task.
        options: Its options.
        include: As `parameters.include` of a run file.
        exclude: As `parameters.exclude`.
        seed: Seed of the permutations.
    """

    def __init__(
        self, task: str, options: dict[str, Any], include: Sequence[str], exclude: Sequence[str], seed: int
    ) -> None:
        self._task = load_task(task, options)
        self._include, self._exclude, self._seed = include, exclude, seed

    def prepare(self, cache: Path) -> None:
        self._task.prepare(cache)

    def model(self, cache: Path) -> nn.Module:
        model = self._task.model(cache)
        parameters, generator = dict(model.named_parameters()), torch.Generator().manual_seed(self._seed)
        with torch.no_grad():
            for name in select_parameters(model, self._include, self._exclude).names:
                values = parameters[name].flatten()
                order = torch.randperm(len(values), generator=generator)
                parameters[name].copy_(values[order].reshape(parameters[name].shape))
        return model

    def examples(self, cache: Path) -> Examples:
        return self._task.examples(cache)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return self._task.logits(model, batch)

    def targets(self, batch: Any) -> Tensor | None:
        return self._task.targets(batch)
