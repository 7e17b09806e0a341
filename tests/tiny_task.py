"""Twelve examples and a softmax regression whose weights depend on a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from npeff.tasks import Examples, Task
from torch import Tensor, nn

N = 12


class TinyTask(Task, Examples):
    """Every instance has the same examples. `shift` is added to the weights when the model is loaded."""

    class_names = ()
    shift = 0.0

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def model(self, cache: Path) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model = nn.Linear(4, 3)
        with torch.no_grad():
            model.weight += self.shift
        return model

    def examples(self, cache: Path) -> Examples:
        return self

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch)
        return logits

    def __len__(self) -> int:
        return N

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.randn(N, 4, generator=torch.Generator().manual_seed(1))[list(indices)]

    def table(self) -> pa.Table:
        return pa.table({"id": [str(i) for i in range(N)], "label": pa.array([i % 3 for i in range(N)], pa.int64())})
