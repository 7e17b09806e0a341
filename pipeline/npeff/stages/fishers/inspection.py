"""Inspection of the task on a worker before the first shard: facts for the driver, and all checks of the task."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npeff.fisher import FisherBatch, GroupLayout, PerExampleFishers
from npeff.gradients import LabelSpec, LeftOut, ParameterLayout, model_fingerprint
from npeff.models.batch_size import largest_batch_size
from npeff.models.loaded import LoadedModel, ModelSpec
from npeff.sketches import SketchSpec, make_sketch
from npeff.stages.fishers.task_table import TaskTable
from npeff.tasks import TaskError

_COVERAGE_EXAMPLES = 2
_TRIED_EXAMPLES = 256
"""Number of examples to search for valid ones. If none is valid, the model or the data set is broken."""
_MOST_LOGITS = 4096
"""Largest number of classes for which the logits of every example are stored."""


@dataclass(frozen=True)
class TaskFacts:
    """Facts of a task that the driver needs to create a store."""

    n_classes: int
    rank: int
    """Largest number of rows of an example's factor."""
    with_logits: bool
    """Whether logits are stored: every example has one prediction, with at most `_MOST_LOGITS` classes."""
    class_names: tuple[str, ...]
    n_examples: int
    layout: ParameterLayout
    groups: tuple[tuple[str, int], ...]
    """`GroupLayout.counts` of the parameters."""
    left_out: dict[str, LeftOut]
    """Parameters that are excluded from the Fishers, with the reason for each."""
    sketch_dim: int
    batch_size: int
    model_fingerprint: str
    seconds_per_example: float
    """Time of one example in a small batch on one worker, which is longer than in a large one."""

    @property
    def n_groups(self) -> int:
        """Total number of groups of the diagonal."""
        return sum(count for _, count in self.groups)


class TaskWorker:
    """Prepares and inspects a task, and writes its table of examples to ``table`` if it is given."""

    def __init__(self, model: ModelSpec, labels: LabelSpec, seed: int, table: TaskTable | None = None) -> None:
        self._spec, self._labels, self._seed, self._table = model, labels, seed, table

    def inspect(self, wanted: tuple[SketchSpec, int | Literal["auto"], int]) -> TaskFacts:
        """Prepare and load the task, and do all checks that are possible before the first shard.

        Args:
            wanted: the sketch, the batch size, and the memory limit of a batch in bytes for batch size "auto".

        Raises:
            TaskError: the data set is empty, logits, labels and class names do not match, or no example is valid.
            UnsupportedModelError: the gradients of a selected parameter cannot be computed.
        """
        sketch, batch_size, limit = wanted
        self._spec.prepare()
        loaded = self._spec.load()
        n_examples = len(loaded.examples)
        if n_examples == 0:
            raise TaskError(f"task {self._spec.task!r} has no examples: return at least one from examples()")
        table = loaded.table()
        first = range(min(_COVERAGE_EXAMPLES, n_examples))
        n_classes = loaded.predict(first, batch_size=_COVERAGE_EXAMPLES).logits[0].shape[-1]
        _try_longest(loaded)
        class_names = _class_names(loaded, n_classes)
        _check_labels(self._spec.task, table["label"], n_classes)
        sequences = loaded.targets(loaded.batch(first), first).dim() > 1
        if self._labels.kind == "empirical" and not sequences and table["label"].null_count:
            raise TaskError(
                f"task {self._spec.task!r}: {table['label'].null_count} examples have no label, and fishers.labels: "
                "empirical needs labels: add the labels, remove these examples, or use sampled labels"
            )
        linear_map = make_sketch(sketch, loaded.layout, self._seed)
        args = loaded.model, loaded.logits, loaded.layout, linear_map, self._labels, loaded.one
        valid = _valid_examples(loaded, fishers := PerExampleFishers(*args))
        batch, targets = loaded.with_targets(valid)
        began = time.monotonic()
        fishers(batch, valid, targets)
        seconds_per_example = (time.monotonic() - began) / len(valid)
        fishers.collector.collect(batch, valid, targets)  # checks that the rows are the gradients
        different = _of_all_sizes(loaded)
        batch, targets = loaded.with_targets(different)
        fishers.collector.check_independence(batch, different, targets)
        if self._table is not None:
            self._table.write(table)
        return TaskFacts(
            n_classes=n_classes,
            rank=self._labels.max_rank(n_classes),
            with_logits=not sequences and n_classes <= _MOST_LOGITS,
            class_names=class_names,
            n_examples=n_examples,
            layout=loaded.layout,
            groups=GroupLayout.of(loaded.model, loaded.layout).counts,
            left_out=loaded.left_out,
            sketch_dim=linear_map.dim,
            batch_size=largest_batch_size(loaded, fishers, limit) if batch_size == "auto" else batch_size,
            model_fingerprint=model_fingerprint(loaded.model, loaded.layout),
            seconds_per_example=seconds_per_example,
        )


def _of_all_sizes(loaded: LoadedModel) -> list[int]:
    """Return the first two examples, the smallest and the largest one."""
    n_examples, sizes = len(loaded.examples), loaded.lengths
    chosen = list(range(min(_COVERAGE_EXAMPLES, n_examples)))
    if sizes is not None:
        chosen += [int(find(sizes)) for find in (np.argmin, np.argmax)]
    return list(dict.fromkeys(chosen))


def _try_longest(loaded: LoadedModel) -> None:
    """Predict the longest example. Raise TaskError if the model fails, for example because it has fewer positions."""
    if loaded.lengths is None:
        return
    longest = int(np.argmax(loaded.lengths))
    try:
        loaded.predict([longest], batch_size=1)
    except TaskError as error:
        raise TaskError(
            f"{error}, on the longest example, number {longest}, of size {loaded.lengths[longest]}",
            "shorten or exclude such examples (Hugging Face tasks: lower max_length)",
        ) from error


def _class_names(loaded: LoadedModel, n_classes: int) -> tuple[str, ...]:
    names = getattr(loaded.examples, "class_names", None)
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise TaskError(
            f"task {loaded.spec.task!r}: examples().class_names must be a list of {n_classes} names, or empty"
        )
    if n_classes < 2 or len(names) not in (0, n_classes):
        raise TaskError(
            f"task {loaded.spec.task!r}: the model has {n_classes} logits for {len(names)} class names: give one name "
            "for each logit, and at least two logits"
        )
    return tuple(str(name) for name in names)


def _check_labels(task: str, labels: pa.ChunkedArray, n_classes: int) -> None:
    wrong = pc.or_(pc.less(labels, 0), pc.greater_equal(labels, n_classes))
    example = pc.index(wrong, True).as_py()
    if example >= 0:
        raise TaskError(
            f"task {task!r}: label {labels[example]} of example {example} is not one of the classes 0 to "
            f"{n_classes - 1}: correct the label, or set it to null if it is unknown"
        )


def _valid_examples(loaded: LoadedModel, fishers: PerExampleFishers) -> list[int]:
    """Return the first few examples with finite logits and gradients, for the checks of the model."""
    tried = min(len(loaded.examples), _TRIED_EXAMPLES)
    valid: list[int] = []
    for start in range(0, tried, _COVERAGE_EXAMPLES):
        indices = range(start, min(start + _COVERAGE_EXAMPLES, tried))
        batch, targets = loaded.with_targets(indices)
        found: FisherBatch = fishers(batch, indices, targets)
        valid += [start + int(row) for row in (found.valid_B & found.ranks_B.gt(0)).nonzero()[:, 0]]
        if len(valid) >= _COVERAGE_EXAMPLES:
            break
    if not valid:
        raise TaskError(
            f"task {loaded.spec.task!r}: none of the first {tried} examples has finite logits and gradients and a "
            "prediction: check the model's weights and the examples for NaN"
        )
    return valid[:_COVERAGE_EXAMPLES]
