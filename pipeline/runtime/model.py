"""The model and the examples of a run, as a worker loads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn

from pipeline.fisher import ParameterLayout, UnsupportedModelError, model_fingerprint, select_parameters
from pipeline.runtime.executor import ExecutorError
from pipeline.tasks import Examples, Task, TaskError, load_task, to_device, user_code

_REQUIRED = ("id", "label")
_COLUMNS: dict[str, tuple[str, Callable[[pa.DataType], bool]]] = {
    "id": ("strings", lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)),
    "label": ("class numbers (integers, null where unknown)", pa.types.is_integer),
    "text": ("strings", lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind)),
    "image": ("PNG files (binary)", lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind)),
}
"""Columns of the examples' table that mean something to the program: what they hold, and whether a type is that."""


@dataclass(frozen=True)
class ModelSpec:
    """What a worker needs to load the model and the examples where it runs."""

    task: str
    options: dict[str, Any]
    cache: Path
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    device: str
    fingerprint: str | None = None
    """Of the parameters, where they must be the ones that the run's Fishers were computed with."""

    def prepare(self) -> None:
        """Let the task do what it does once for all workers."""
        task = load_task(self.task, self.options)
        self.cache.mkdir(parents=True, exist_ok=True)
        with self.user_code(task, "prepare"):
            task.prepare(self.cache)

    def load(self) -> LoadedModel:
        """The model in eval mode on its device, and the examples.

        Raises:
            TaskError: the task's code raised something, returned something else than a model or examples, or a model
                that is not the one of the fingerprint.
            ExecutorError: a GPU was asked for and there is none.
        """
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ExecutorError("torch finds no GPU where the work runs: set executor.gpus_per_worker to 0")
        task = load_task(self.task, self.options)
        with self.user_code(task, "model"):
            model = task.model(self.cache)
        if not isinstance(model, nn.Module):
            raise TaskError(f"task {self.task!r}: model() must return a torch.nn.Module, not {_kind(model)}")
        with self.user_code(task, "examples"):
            examples = task.examples(self.cache)
        if not isinstance(examples, Examples):
            raise TaskError(
                f"task {self.task!r}: examples() must return a pipeline.tasks.Examples, not {_kind(examples)}"
            )
        loaded = LoadedModel(self, task, model.to(device).eval(), examples, device)
        if self.fingerprint not in (None, model_fingerprint(model, loaded.layout)):
            raise TaskError(
                f"task {self.task!r}: model() does not return the model that the Fishers of this run are of: give back "
                "the former weights, seed what draws them at random, or choose another run_dir"
            )
        return loaded

    def user_code(self, task: Task, method: str) -> AbstractContextManager[None]:
        """The context to call a method of the task in."""
        return user_code(f"task {self.task!r}: {method}()", type(task).__module__, passed_on=(UnsupportedModelError,))


@dataclass(frozen=True)
class LoadedModel:
    spec: ModelSpec
    task: Task
    model: nn.Module
    examples: Examples
    device: torch.device
    layout: ParameterLayout = field(init=False)

    def __post_init__(self) -> None:
        layout = select_parameters(self.model, self.spec.include, self.spec.exclude)
        object.__setattr__(self, "layout", layout)

    def batch(self, indices: Sequence[int]) -> Any:
        with self.spec.user_code(self.task, "examples().batch"):
            batch = self.examples.batch(indices)
        return to_device(batch, self.device)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        with self.spec.user_code(self.task, "logits"):
            logits = self.task.logits(model, batch)
        if not isinstance(logits, Tensor):
            raise TaskError(f"task {self.spec.task!r}: logits() must return a tensor, not {_kind(logits)}")
        return logits

    def table(self) -> pa.Table:
        """What the task says of its examples, for people to look at.

        Raises:
            TaskError: it has not one row per example, or a column is missing or of another type than it must be.
        """
        with self.spec.user_code(self.task, "examples().table"):
            n_examples, table = len(self.examples), self.examples.table()
        where = f"task {self.spec.task!r}: the table of the examples"
        if not isinstance(table, pa.Table):
            raise TaskError(f"{where} must be a pyarrow.Table, not {_kind(table)}")
        if len(table) != n_examples:
            raise TaskError(f"{where} must have one row per example, {n_examples}, not {len(table)}")
        for name, (kind, fits) in _COLUMNS.items():
            if name not in table.column_names:
                if name in _REQUIRED:
                    raise TaskError(f"{where} has no column {name!r}: it must have {' and '.join(_REQUIRED)}")
            elif not (fits(table[name].type) or (pa.types.is_null(table[name].type) and name != "id")):
                raise TaskError(f"{where}: column {name!r} must hold {kind}, not {table[name].type}")
        if table["id"].null_count:
            raise TaskError(f"{where}: column 'id' must not be null")
        return table

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
                    f"task {self.spec.task!r}: logits() must return examples x classes, here {len(chosen)} x C, "
                    f"not {' x '.join(map(str, logits.shape)) or 'a single number'}"
                )
            parts.append(logits.float().cpu())
        return torch.cat(parts)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
