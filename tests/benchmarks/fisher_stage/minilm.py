"""A small BERT fine-tuned on SICK sentence pairs, from the folder that NPEFF_SHARED_DATA names: the run file's task."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.runs.config import RunConfig

from fisher_stage.workload import Workload

RUN_FILE = Path(__file__).parents[3] / "jobs" / "minilm-sick.yaml"
DATA = Path("data/sick/SICK_test_annotated.txt")


def available() -> bool:
    folder = os.environ.get("NPEFF_SHARED_DATA")
    return folder is not None and (Path(folder) / DATA).is_file()


def config(run_dir: Path, data: Path | None = None, **fishers: Any) -> RunConfig:
    """The run file on all pairs, or on those of another file; some values of its section `fishers` replaced."""
    found = RunConfig.from_yaml(RUN_FILE)
    options = {**found.task.options, "limit": None} | ({} if data is None else {"data": str(data)})
    return found.model_copy(
        update={
            "run_dir": str(run_dir),
            "task": found.task.model_copy(update={"options": options}),
            "fishers": found.fishers.model_copy(update=fishers),
        }
    )


def model_spec(config: RunConfig, device: str = "cpu") -> ModelSpec:
    task, parameters = config.task, config.parameters
    cache = Path(config.run_dir) / "task"
    return ModelSpec(task.name, task.options, cache, parameters.include, parameters.exclude, device)


def drawn_pairs(count: int, path: Path) -> None:
    """A file of pairs drawn from all of them, in their order."""
    header, *rows = (Path(os.environ["NPEFF_SHARED_DATA"]) / DATA).read_text(encoding="utf-8").splitlines()
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count].sort().values
    path.write_text("\n".join([header, *(rows[index] for index in chosen.tolist())]) + "\n", encoding="utf-8")


def workload(loaded: LoadedModel, batch_size: int, shard_size: int) -> Workload:
    """Every example, in the batches that a worker makes of shards of this size."""
    count = len(loaded.examples)
    shards = [range(start, min(start + shard_size, count)) for start in range(0, count, shard_size)]
    numbers = [batch for shard in shards for batch in loaded.batches(shard, batch_size)]
    batches = [(chosen, loaded.batch(chosen), None) for chosen in numbers]
    return Workload(loaded.model, loaded.logits, loaded.layout, batches, loaded.model.get_submodule("bert.embeddings"))
