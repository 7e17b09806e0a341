"""The model and the examples of a run, loaded on a worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from npeff.errors import hide_values
from npeff.execution.executor import ExecutorError, WorkerLostError
from npeff.execution.serial import computing_threads
from npeff.execution.team import Team, current_team
from npeff.gradients import (
    LeftOut,
    ParameterLayout,
    UnsupportedModelError,
    left_out,
    model_fingerprint,
    select_parameters,
)
from npeff.input_fisher.flat_inputs import FlatInputs
from npeff.models.example_table import problem_of_table
from npeff.models.heap import keep_freed_memory
from npeff.models.input_checks import problem_of_inputs, problem_of_logits
from npeff.models.predictions import Predictions, joined
from npeff.models.sharding import Shards, divide
from npeff.models.single_precision import batch_in_single_precision, in_single_precision
from npeff.models.trainable import trainable
from npeff.store.task_files import preparing, task_files
from npeff.tasks import UNKNOWN, Examples, Inputs, Task, TaskError, Token, load_task, to_device, user_code
from npeff.variables import resolved

_DIVISIBLE = 1_000_000
"""Parameters times examples above which all threads compute a forward pass. A network of ten thousand parameters takes
several times as long on two threads as on one."""
_PASSED_ON = (UnsupportedModelError, WorkerLostError)
"""Errors that the code of a task passes on: those of the hooks of this package."""


@dataclass(frozen=True)
class ModelSpec:
    """The specification with which a worker loads the model and the examples.

    ``task`` and ``options`` are texts of the run file. They contain names of environment variables, and the values come
    from the environment of the worker.
    """

    task: str
    options: dict[str, Any]
    cache: Path
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    device: str
    fingerprint: str | None = None
    """Fingerprint of the parameters from which the run's Fishers were computed. None if the parameters are not
    checked."""

    def prepare(self) -> None:
        """Run the task's preparation, once for all workers."""
        task = self._load_task()
        with preparing(self.cache) as cache, self.user_code(task, "prepare"):
            task.prepare(cache)

    def load(self) -> LoadedModel:
        """Load the model, in evaluation mode on its device, and the examples.

        Returns:
            The loaded model and examples.

        Raises:
            TaskError: The task's code raised an exception or returned an object of the wrong type, or the model does
                not match the fingerprint.
            ExecutorError: The device is a GPU and no GPU is available.
            VariableError: The task's options refer to an environment variable that is not set on this machine.
        """
        device = torch.device(self.device)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ExecutorError("torch finds no GPU on the machine of this worker: set executor.gpus_per_worker to 0")
        if (team := current_team()) is not None:
            team.begin_loading()
        task = self._load_task()
        model, shards = self._load_model(task, team, device)
        with self.user_code(task, "examples"):
            examples = task.examples(task_files(self.cache))
        if not isinstance(examples, Examples):
            raise TaskError(f"task {self.task!r}: examples() must return a npeff.tasks.Examples, not {_kind(examples)}")
        loaded = LoadedModel(self, task, model, examples, device, shards)
        if self.fingerprint not in (None, model_fingerprint(model, loaded.layout)):
            raise TaskError(
                f"task {self.task!r}: model() returns another model than the one of the stored Fishers: restore the "
                "former weights, seed the random initialization, or choose another run_dir"
            )
        return loaded

    def load_shards(self, team: Team) -> nn.Module:
        """Load the parts of the model that this process keeps for the first process of a team, which calls `load`."""
        return self._load_model(self._load_task(), team, torch.device(self.device))[0]

    def _load_model(self, task: Task, team: Team | None, device: torch.device) -> tuple[nn.Module, Shards | None]:
        method = "model" if team is None or team.rank == 0 else "skeleton"
        cache = self.cache if team is None else Path(team.text(str(self.cache)))  # that of a trial is a temporary one
        with self.user_code(task, method):
            model = getattr(task, method)(task_files(cache))
        if not isinstance(model, nn.Module):
            raise TaskError(f"task {self.task!r}: {method}() must return a torch.nn.Module, not {_kind(model)}")
        model = trainable(model).eval()
        shards = None if team is None else divide(model, team, device)
        keep_freed_memory()  # not before: the parameters that were sent to other processes are freed
        return (model.to(device) if team is None else model), shards

    def _load_task(self) -> Task:
        try:
            return load_task(resolved(self.task, "task.name"), resolved(self.options, "task.options"))
        except TaskError as error:
            hide_values(error)
            raise

    def user_code(self, task: Task, method: str) -> AbstractContextManager[None]:
        """Return the context in which to call a method of the task. It converts exceptions to errors of the task."""
        return user_code(
            f"task {self.task!r}: {method}()", type(task).__module__, passed_on=(UnsupportedModelError, WorkerLostError)
        )


@dataclass(frozen=True)
class LoadedModel:
    """The model, the examples and the parameter layout of a run on one device."""

    spec: ModelSpec
    task: Task
    model: nn.Module
    examples: Examples
    device: torch.device
    shards: Shards | None = None
    """The parts of the parameters, if they are divided among processes (`npeff.models.sharding`)."""
    layout: ParameterLayout = field(init=False)

    def __post_init__(self) -> None:
        layout = select_parameters(self.model, self.spec.include, self.spec.exclude)
        object.__setattr__(self, "layout", layout)

    @property
    def left_out(self) -> dict[str, LeftOut]:
        """The parameters that are not in the layout, each with the reason."""
        return left_out(self.model, self.layout, self.spec.exclude)

    def batch(self, indices: Sequence[int]) -> Any:
        with self.spec.user_code(self.task, "examples().batch"):
            batch = self.examples.batch(indices)
        return to_device(batch, self.device)

    def targets(self, batch: Any, indices: Sequence[int]) -> Tensor:
        """Return the class of each prediction of a batch, int64.

        The shape is (B, T) if the task defines targets. Otherwise the classes (B,) are the labels in the table.
        """
        with self.spec.user_code(self.task, "targets"):
            targets = self.task.targets(batch)
        if targets is None:
            return torch.from_numpy(self.labels_N[list(indices)]).to(self.device)
        if not isinstance(targets, Tensor):
            raise TaskError(f"task {self.spec.task!r}: targets() must return a tensor or None, not {_kind(targets)}")
        if targets.is_floating_point():
            raise TaskError(f"task {self.spec.task!r}: targets() must return class numbers, not {targets.dtype}")
        return targets.to(self.device, torch.long)

    @cached_property
    def single_precision_model(self) -> nn.Module:
        """The model of `inputs`: a copy in float32 if the model is in half precision, otherwise the model itself."""
        return in_single_precision(self.model)

    def inputs(self, batch: Any, n_examples: int | None = None) -> Inputs:
        """Return the real-valued inputs of a batch. Values and logits are in float32 or float64.

        Args:
            batch: A batch of `batch`.
            n_examples: Number of examples of the batch, with which the first axis of the values is compared.

        Raises:
            TaskError: The task has no such inputs, or its method `inputs` returns something else.
        """
        model = self.single_precision_model
        with self.spec.user_code(self.task, "inputs"):
            inputs = self.task.inputs(model, batch_in_single_precision(batch))
        if inputs is None:
            raise TaskError(
                f"task {self.spec.task!r} has no floating-point inputs: give the task an `inputs` method that returns "
                "npeff.tasks.Inputs"
            )
        if not isinstance(inputs, Inputs):
            raise TaskError(f"task {self.spec.task!r}: inputs() must return npeff.tasks.Inputs, not {_kind(inputs)}")
        if problem := problem_of_inputs(inputs, n_examples):
            raise TaskError(f"task {self.spec.task!r}: inputs() {problem}")

        def logits(values: Tensor) -> Tensor:
            with self.spec.user_code(self.task, "inputs().logits"):
                found = inputs.logits(values)
            if not isinstance(found, Tensor):
                raise TaskError(f"task {self.spec.task!r}: inputs().logits() must return a tensor, not {_kind(found)}")
            return found

        values = batch_in_single_precision(inputs.values.detach())
        mask = inputs.present if inputs.mask is None else inputs.mask  # padding is no input
        masks = {"mask": mask, "present": inputs.present, "group_of": inputs.group_of}
        return replace(inputs, values=values, logits=logits, **to_device(masks, values.device))

    def flat_inputs(self, batch: Any, n_examples: int | None = None) -> FlatInputs:
        """Return the inputs of a batch as positions and features. Arguments and errors are those of `inputs`."""
        return flattened(self.inputs(batch, n_examples))

    def check_inputs(self, indices: Sequence[int]) -> None:
        """Check the inputs of some examples: whether their logits are those of the task, up to rounding.

        Raises:
            TaskError: They are not, they do not depend on the values by differentiable operations, or the positions
                of exchangeable inputs are not those of the tokens.
        """
        batch = self.batch(indices)
        inputs = self.inputs(batch, len(indices))
        with torch.no_grad():
            expected = self.logits(self.single_precision_model, batch_in_single_precision(batch))
        with torch.enable_grad():
            values = inputs.values.clone().requires_grad_()
            problem = problem_of_logits(values, inputs.logits(values), expected)
        if problem:
            raise TaskError(f"task {self.spec.task!r}: the logits of inputs() {problem}")
        tokens = self.input_tokens(indices) if inputs.exchangeable else None
        if tokens is None:
            return
        flat = FlatInputs.of(inputs.values, inputs.logits, inputs.positions, inputs.present)
        for index, row, used_P in zip(indices, tokens, flat.used_BP, strict=True):
            if len(row) != int(used_P.sum()):
                raise TaskError(
                    f"task {self.spec.task!r}: inputs() must return one position for each token, besides padding "
                    f"(present): example {index} has {len(row)} tokens, and {int(used_P.sum())} positions"
                )

    def with_targets(self, indices: Sequence[int]) -> tuple[Any, Tensor]:
        """Return the batch with the given examples, and its targets."""
        batch = self.batch(indices)
        return batch, self.targets(batch, indices)

    def one(self, index: int) -> tuple[Any, Tensor]:
        """Return the batch with one example, and its targets."""
        return self.with_targets([index])

    @cached_property
    def labels_N(self) -> NDArray[np.int64]:
        """The labels in the table, UNKNOWN where a label is null."""
        labels: NDArray[np.int64] = self.table()["label"].cast(pa.int64()).fill_null(UNKNOWN).to_numpy()
        return labels

    @cached_property
    def lengths(self) -> Sequence[int] | NDArray[np.integer] | None:
        """The size of each example; None if the task defines no sizes."""
        with self.spec.user_code(self.task, "examples().lengths"):
            lengths = self.examples.lengths()
        if lengths is not None and len(lengths) != len(self.examples):
            raise TaskError(
                f"task {self.spec.task!r}: examples().lengths() must return one size per example, "
                f"{len(self.examples)}, not {len(lengths)}"
            )
        return lengths

    def batches(self, indices: Sequence[int], batch_size: int) -> list[list[int]]:
        """Split `indices` into batches of examples of similar size, to reduce padding. The result is deterministic."""
        ordered = list(indices)
        if self.lengths is not None:
            ordered.sort(key=self.lengths.__getitem__)
        return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]

    def tokens(self, indices: Sequence[int]) -> list[list[Token]] | None:
        """Return the tokens at the positions of each example; None if the task does not define tokens."""
        return self._checked_tokens("tokens", self.examples.tokens, indices)

    def input_tokens(self, indices: Sequence[int]) -> list[list[Token]] | None:
        """Return the tokens at the positions of the inputs of each example; None if the positions are not tokens."""
        return self._checked_tokens("input_tokens", self.examples.input_tokens, indices)

    def _checked_tokens(
        self, method: str, tokens: Callable[[Sequence[int]], list[list[Token]] | None], indices: Sequence[int]
    ) -> list[list[Token]] | None:
        with self.spec.user_code(self.task, f"examples().{method}"):
            found = tokens(indices)
            rows = None if found is None else [[Token(*token) for token in row] for row in found]
        if rows is not None and (len(rows) != len(indices) or not all(rows)):
            raise TaskError(
                f"task {self.spec.task!r}: examples().{method}() must return a list of one or more tokens for each of "
                f"the {len(indices)} requested examples"
            )
        return rows

    def class_texts(self, classes: Sequence[int]) -> list[str | None]:
        """Return the names or texts of classes, for display; None for a class without one."""
        if names := self.examples.class_names:
            return [names[number] for number in classes]
        return self._texts("class_texts", classes, "classes")

    def prediction_texts(self, predictions: Sequence[tuple[int, int]]) -> list[str | None]:
        """Return texts of single predictions, for display; see `Examples.prediction_texts`."""
        return self._texts("prediction_texts", predictions, "predictions")

    def _texts(self, method: str, of: Sequence[Any], what: str) -> list[str | None]:
        with self.spec.user_code(self.task, f"examples().{method}"):
            texts = getattr(self.examples, method)(of)
        if texts is None:
            return [None] * len(of)
        if len(texts) != len(of) or not all(text is None or isinstance(text, str) for text in texts):
            raise TaskError(
                f"task {self.spec.task!r}: examples().{method}() must return a text or None for each of the "
                f"{len(of)} requested {what}"
            )
        return list(texts)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        with self.spec.user_code(self.task, "logits"):
            try:
                logits = self.task.logits(model, batch)
            except RuntimeError as error:
                if self.shards is None or not self.shards.keep_uncalled(error):
                    raise
                logits = self.task.logits(model, batch)
        if not isinstance(logits, Tensor):
            raise TaskError(f"task {self.spec.task!r}: logits() must return a tensor, not {_kind(logits)}")
        return logits

    def table(self) -> pa.Table:
        """Return the task's table of examples, with one row per example.

        Raises:
            TaskError: The number of rows differs from the number of examples, or a column is missing or has the wrong
                type.
        """
        with self.spec.user_code(self.task, "examples().table"):
            n_examples, table = len(self.examples), self.examples.table()
        is_table = isinstance(table, pa.Table)
        problem = problem_of_table(table, n_examples) if is_table else f" must be a pyarrow.Table, not {_kind(table)}"
        if problem is not None:
            raise TaskError(f"task {self.spec.task!r}: the table of the examples{problem}")
        return table

    @torch.no_grad()
    def predict(self, indices: Sequence[int], batch_size: int) -> Predictions:
        """Compute the predictions of the model, with its current parameters, on the given examples.

        Args:
            indices: Numbers of the examples.
            batch_size: Number of examples per batch.

        Returns:
            The predictions in the order of `indices`, on the CPU.

        Raises:
            TaskError: The logits do not have the shape (B, C), or (B, T, C) with targets (B, T).
        """
        plan = self.batches(indices, batch_size)
        place = {example: place for place, example in enumerate(example for chosen in plan for example in chosen)}
        return joined([self._predictions(chosen) for chosen in plan]).at(place[index] for index in indices)

    def _predictions(self, chosen: list[int]) -> Predictions:
        """Return the predictions on one batch."""
        batch = self.batch(chosen)
        with computing_threads(self.threads(len(chosen))):
            logits, targets = self.logits(self.model, batch), self.targets(batch, chosen)
        if logits.shape[:-1] != targets.shape or logits.dim() < 2 or len(logits) != len(chosen):
            found_shape = " x ".join(map(str, logits.shape)) or "a single number"
            hint = " (logits with positions need targets())" if logits.dim() == 3 else ""
            raise TaskError(
                f"task {self.spec.task!r}: logits() must return examples x classes, here {len(chosen)} x C, not "
                f"{found_shape}{hint}"
            )
        return Predictions.of(logits, targets)

    def threads(self, n_examples: int) -> int:
        """Return the number of threads for passes of a batch: one if the operations are too small to be divided."""
        return torch.get_num_threads() if n_examples * self._n_parameters > _DIVISIBLE else 1

    @cached_property
    def _n_parameters(self) -> int:
        return sum(map(Tensor.numel, self.model.parameters()))


def flattened(inputs: Inputs) -> FlatInputs:
    """Return inputs as positions and features."""
    return FlatInputs.of(inputs.values, inputs.logits, inputs.positions, inputs.mask, inputs.exchangeable)


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
