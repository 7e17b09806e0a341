"""A look at the task on a worker, before anything is spent: what the driver must know, and all that can be refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from pipeline.fisher import (
    ParameterLayout,
    PerExampleFishers,
    Sketch,
    SketchSpec,
    check_coverage,
    make_sketch,
    model_fingerprint,
)
from pipeline.runtime.model import LoadedModel, ModelSpec
from pipeline.tasks import TaskError

_COVERAGE_EXAMPLES = 2
_TRIED_EXAMPLES = 256
"""If none of so many examples is valid, the model or the data set is broken."""


@dataclass(frozen=True)
class TaskFacts:
    """What the driver must know of a task before it can lay out a store."""

    n_classes: int
    class_names: tuple[str, ...]
    examples: pa.Table
    layout: ParameterLayout
    sketch_dim: int
    model_fingerprint: str


class TaskWorker:
    """Prepares a task and looks at it."""

    def __init__(self, model: ModelSpec) -> None:
        self._spec = model

    def inspect(self, sketch: SketchSpec) -> TaskFacts:
        """Prepare the task, load it, and check everything that can be checked before the first shard.

        Raises:
            TaskError: the data set is empty, logits, labels and class names do not fit, or no example is valid.
            UnsupportedModelError: a selected parameter's gradients cannot be had.
        """
        self._spec.prepare()
        loaded = self._spec.load()
        n_examples = len(loaded.examples)
        if n_examples == 0:
            raise TaskError(f"task {self._spec.task!r} has no examples: there is nothing to compute Fishers of")
        table = loaded.table()
        n_classes = loaded.predict(range(min(_COVERAGE_EXAMPLES, n_examples)), batch_size=_COVERAGE_EXAMPLES).shape[1]
        class_names = _class_names(loaded, n_classes)
        _check_labels(self._spec.task, table["label"], n_classes)
        linear_map = make_sketch(sketch, loaded.layout)
        check_coverage(loaded.model, loaded.logits, loaded.batch(_valid_examples(loaded, linear_map)), loaded.layout)
        return TaskFacts(
            n_classes=n_classes,
            class_names=class_names,
            examples=table,
            layout=loaded.layout,
            sketch_dim=linear_map.dim,
            model_fingerprint=model_fingerprint(loaded.model, loaded.layout),
        )


def _class_names(loaded: LoadedModel, n_classes: int) -> tuple[str, ...]:
    names = getattr(loaded.examples, "class_names", None)
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise TaskError(f"task {loaded.spec.task!r}: examples().class_names must be a list of {n_classes} names")
    if n_classes < 2 or n_classes != len(names):
        raise TaskError(
            f"task {loaded.spec.task!r}: the model has {n_classes} logits for {len(names)} class names: there must be "
            "as many names as logits, and at least two"
        )
    return tuple(str(name) for name in names)


def _check_labels(task: str, labels: pa.ChunkedArray, n_classes: int) -> None:
    for example, label in enumerate(labels.to_pylist()):
        if label is not None and not 0 <= label < n_classes:
            raise TaskError(
                f"task {task!r}: label {label} of example {example} is none of the classes 0 to {n_classes - 1}: "
                "correct it, or make it null where it is unknown"
            )


def _valid_examples(loaded: LoadedModel, sketch: Sketch) -> list[int]:
    """The first few examples with finite logits and gradients, to check the model on."""
    fishers = PerExampleFishers(loaded.model, loaded.logits, loaded.layout, sketch)
    tried = min(len(loaded.examples), _TRIED_EXAMPLES)
    valid: list[int] = []
    for start in range(0, tried, _COVERAGE_EXAMPLES):
        indices = range(start, min(start + _COVERAGE_EXAMPLES, tried))
        valid += [start + int(row) for row in fishers(loaded.batch(indices), len(indices)).valid_B.nonzero()[:, 0]]
        if len(valid) >= _COVERAGE_EXAMPLES:
            break
    if not valid:
        raise TaskError(
            f"task {loaded.spec.task!r}: none of the first {tried} examples has finite logits and gradients: look for "
            "NaN in the model's weights and in the examples"
        )
    return valid[:_COVERAGE_EXAMPLES]
