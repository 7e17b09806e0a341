"""The model and the examples of a run, as a worker loads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.fisher import ParameterLayout, select_parameters
from pipeline.tasks import Examples, Task, TaskError, load_task, to_device


@dataclass(frozen=True)
class ModelSpec:
    """What a worker needs to load the model and the examples where it runs."""

    task: str
    options: dict[str, Any]
    cache: Path
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    device: str

    def load(self) -> LoadedModel:
        task = load_task(self.task, self.options)
        device = torch.device(self.device)
        model = task.model(self.cache).to(device).eval()
        return LoadedModel(task, model, task.examples(self.cache), device, self.include, self.exclude)


@dataclass(frozen=True)
class LoadedModel:
    task: Task
    model: nn.Module
    examples: Examples
    device: torch.device
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    layout: ParameterLayout = field(init=False)

    def __post_init__(self) -> None:
        layout = select_parameters(self.model, self.include, self.exclude)
        object.__setattr__(self, "layout", layout)

    def batch(self, indices: Sequence[int]) -> Any:
        return to_device(self.examples.batch(indices), self.device)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        return self.task.logits(model, batch)

    @torch.no_grad()
    def predict(self, indices: Sequence[int], batch_size: int) -> Tensor:
        """Logits (n, C) of these examples at the parameters that the model has now, on the CPU.

        Raises:
            TaskError: the logits are not (B, C).
        """
        parts = []
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            logits = self.logits(self.model, self.batch(chosen))
            if logits.ndim != 2 or logits.shape[0] != len(chosen):
                raise TaskError(
                    f"the task's logits must be examples x classes, {len(chosen)} x C, not {tuple(logits.shape)}"
                )
            parts.append(logits.float().cpu())
        return torch.cat(parts)
