"""The skeleton of every task's model has the tensors of the model, without memory for the values of its parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")
pytest.importorskip("peft", reason="needs pip install peft")

from npeff.tasks import Task, load_task
from test_adapters import FAMILIES, folder, save_adapter
from torch import nn

__all__ = ["folder"]


def task_of(folder: Path, name: str, **options: object) -> Task:
    given = {"model": str(folder / name), "data": str(folder / "data.parquet"), **FAMILIES[name].options, **options}
    return load_task(f"huggingface-{name}", given)


def tensors_of(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, value.shape, value.dtype) for name, value in named]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_skeleton_has_the_tensors_of_the_model_and_no_values(folder: Path, name: str, dtype: str) -> None:
    task = task_of(folder, name, dtype=dtype)
    model, skeleton = task.model(folder), task.skeleton(folder)
    assert tensors_of(skeleton) == tensors_of(model)
    assert type(skeleton) is type(model)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert not any(parameter.is_meta for parameter in task.model(folder).parameters())


def test_the_skeleton_of_a_model_with_an_adapter_is_the_model(folder: Path, tmp_path: Path) -> None:
    save_adapter(FAMILIES["causal-lm"], folder / "causal-lm", tmp_path / "adapter", "LORA")
    task = task_of(folder, "causal-lm", adapter=str(tmp_path / "adapter"))
    model, skeleton = task.model(folder), task.skeleton(folder)
    assert tensors_of(skeleton) == tensors_of(model)
