"""A small network in float64 with several shards of examples: its mean Fisher can be formed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import npeff
import pyarrow as pa
import torch
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.tasks import Examples, Task
from torch import Tensor, nn

N, CLASSES = 48, 4


class SmallNet(Task, Examples):
    """48 examples of 4 classes, of which every sixth has a wrong label. `shift` is added when the model is loaded."""

    class_names = ("a", "b", "c", "d")
    shift = 0.0

    def model(self, cache: Path) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        with torch.no_grad():
            for value in model.parameters():
                value.mul_(2).add_(self.shift)
        return model

    def examples(self, cache: Path) -> Examples:
        return self

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        logits: Tensor = model(batch)
        return logits

    def __len__(self) -> int:
        return N

    def batch(self, indices: Sequence[int]) -> Tensor:
        return torch.randn(N, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[list(indices)]

    def labels(self) -> list[int]:
        predictions: Tensor = self.model(Path())(self.batch(range(N))).argmax(-1)
        return [(int(each) + (number % 6 == 0)) % CLASSES for number, each in enumerate(predictions)]

    def table(self) -> pa.Table:
        return pa.table({"id": [f"x{i}" for i in range(N)], "label": pa.array(self.labels(), pa.int64())})


def document(path: Path, **sections: Any) -> dict[str, Any]:
    fishers = {"sketch": {"dim": 64}, "shard_size": 10, "store_dtype": "float32", "diagonal": {"mean": True}}
    return {
        "run_dir": str(path),
        "task": {"name": "stages.small_net:SmallNet"},
        "fishers": fishers | sections.pop("fishers", {}),
        "factorization": {"n_components": 2, "held_out_fraction": 0.4, "stability_examples": 0},
        "executor": {"kind": "serial"},
        **sections,
    }


def prepared(path: Path, **sections: Any) -> RunDirectory:
    run = RunDirectory.create(RunConfig.model_validate(document(path, **sections)))
    npeff.compute_fishers(run)
    return run
