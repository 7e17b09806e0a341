"""Classification of the rows of a table: numbers and one-hot categories, and a small network or a model of the user.

The table is a file, or one of the classification data sets that scikit-learn contains, which need no download.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from npeff.errors import as_one_line
from npeff.tasks.base import Examples, Inputs, Task
from npeff.tasks.errors import TaskError
from npeff.tasks.labels import class_numbers, distinct_names
from npeff.tasks.sklearn_table_options import SklearnTableOptions
from npeff.tasks.tables import example_table, texts, type_of
from npeff.tasks.trained_model import train_once, trained_classifier, with_weights
from npeff.tasks.user_exceptions import user_code

_MODEL_FILE = "table-model.safetensors"
_HIDDEN, _EPOCHS, _TRAIN_FRACTION = (32, 32), 20, 0.5
_FEWEST_TRAINING_ROWS = 10


class SklearnTableTask(Task):
    """A multilayer perceptron that is trained on a part of the rows, or a model of the user, on the rows of a table."""

    Options = SklearnTableOptions
    __signature__ = inspect.signature(SklearnTableOptions)  # so that the options can be listed

    def __init__(self, **options: Any) -> None:
        self.options = SklearnTableOptions(**options)

    def prepare(self, cache: Path) -> None:
        if self.options.model is not None:
            return
        table, options = self._table, self.options

        def train() -> nn.Module:
            inputs, targets = table.inputs[table.train], table.targets[table.train]
            epochs = _EPOCHS if options.epochs is None else options.epochs
            return trained_classifier(self._network(), inputs, targets, epochs=epochs, seed=options.seed)

        train_once(cache / _MODEL_FILE, train)

    def model(self, cache: Path) -> nn.Module:
        if self.options.model is None:
            return with_weights(self._network(), cache / _MODEL_FILE)
        n_inputs, n_classes = len(self._table.input_names), len(self._table.class_names)
        return _own_model(self.options.model, self.options.weights, n_inputs, n_classes)

    def examples(self, cache: Path) -> Examples:
        return _Rows(self._table)

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits: Tensor = model(batch)
        expected = (len(batch), len(self._table.class_names))
        if self.options.model is not None and logits.shape != expected:
            raise TaskError(
                f"model {self.options.model!r} returns {tuple(logits.shape)}, not {expected}: (rows, classes)"
            )
        return logits

    def inputs(self, model: nn.Module, batch: Tensor) -> Inputs:
        """Return the rows. A column is a group: of one number, or of the values of a category."""
        table = self._table
        groups = tuple(dict.fromkeys(table.input_columns))
        return Inputs(
            batch,
            lambda values: self.logits(model, values),
            names=table.input_names,
            groups=groups,
            group_of=torch.tensor([groups.index(column) for column in table.input_columns]),
        )

    @functools.cached_property
    def _table(self) -> _Table:
        return _Table(self.options)

    def _network(self) -> nn.Module:
        """Return the network with its initial weights. Its first layer standardizes the inputs."""
        table, widths = self._table, self.options.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.options.seed)
            return _Network(table.inputs[table.train], _HIDDEN if widths is None else widths, len(table.class_names))


class _Network(nn.Module):
    """A multilayer perceptron of standardized inputs.

    Args:
        inputs_NF: The rows from which mean and standard deviation of the inputs are computed.
        widths: Widths of the hidden layers.
        n_classes: Number of classes.
    """

    def __init__(self, inputs_NF: Tensor, widths: Sequence[int], n_classes: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.scale: Tensor
        deviation_F = inputs_NF.double().std(0, correction=0)
        self.register_buffer("mean", inputs_NF.double().mean(0).float())
        self.register_buffer("scale", torch.where(deviation_F > 0, deviation_F, 1).float())
        sizes = [inputs_NF.shape[1], *widths, n_classes]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.layers = nn.Sequential(*layers[:-1])
        self.eval()

    def forward(self, inputs_BF: Tensor) -> Tensor:
        logits: Tensor = self.layers((inputs_BF - self.mean) / self.scale)
        return logits


class _Table:
    """The rows of the data as inputs of a model."""

    def __init__(self, options: SklearnTableOptions) -> None:
        self._options, self.rows, self.label_column = options, options.rows(), options.label
        known = [label for label in self.rows[options.label].to_pylist() if label is not None]
        names = options.label_names or sorted(set(known), key=lambda label: (isinstance(label, str), label))
        self.class_names = distinct_names(names)
        if len(self.class_names) < 2:
            raise TaskError(
                f"{options.data}: column {options.label!r} has fewer than two classes: choose another column"
            )
        values = options.label_values if options.label_names else "names"
        self.labels = class_numbers(self.rows[options.label].to_pylist(), self.class_names, options.data, values)
        self.targets = torch.tensor([-1 if label is None else label for label in self.labels], dtype=torch.int64)
        self.input_names, self.input_columns, self.inputs = self._inputs()
        self.train, self.examples = self._split()

    def _inputs(self) -> tuple[tuple[str, ...], tuple[str, ...], Tensor]:
        """Return the names of the inputs, their columns, and their values (N, F) in float32."""
        options = self._options
        categories = options.category_columns or ()
        taken = {"id", options.label, options.id_column, *categories}
        numeric = options.numeric_columns
        if numeric is None:
            numeric = [each.name for each in self.rows.schema if each.name not in taken and _is_number(each.type)]
        inputs = [(name, name, self._numbers(name)) for name in numeric]
        for name in categories:
            cells = np.array(list(texts(self.rows, name, options.data)))
            inputs += [
                (f"{name}={value}", name, (cells == value).astype(np.float64)) for value in np.unique(cells) if value
            ]
        if not inputs:
            raise TaskError(f"{options.data} has no inputs: give numeric_columns or category_columns")
        names, columns, values = zip(*inputs, strict=True)
        if len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            raise TaskError(f"{options.data}: two inputs have the name {twice!r}: name each column once, or rename one")
        return names, columns, torch.from_numpy(np.stack(values, 1).astype(np.float32))

    def _numbers(self, name: str) -> NDArray[np.float64]:
        data, rows = self._options.data, self.rows
        if name not in rows.column_names:
            raise TaskError(f"{data} has no column {name!r}: it has {', '.join(rows.column_names[1:])}")
        if name == self._options.label:
            raise TaskError(f"numeric_columns: {name!r} is the column of labels: remove it")
        if not _is_number(rows[name].type):
            remedy = "give it in category_columns, or choose another column"
            raise TaskError(f"{data}: column {name!r} has type {type_of(rows, name)}, not numbers: {remedy}")
        values: NDArray[np.float64] = pc.fill_null(rows[name].cast(pa.float64()), float("nan")).to_numpy()
        bad = ~(np.abs(values) <= np.finfo(np.float32).max)
        if bad.any():
            row = rows["id"][int(np.argmax(bad))].as_py()
            problem = f"{data}: column {name!r} of row {row!r} is missing or not finite"
            raise TaskError(problem, "fill in the value, or leave out the column or the row (filter)")
        return values

    def _split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the numbers of the training rows and of the examples."""
        everything, options = np.arange(len(self.rows)), self._options
        if options.model is not None:
            return everything[:0], everything
        known = everything[self.targets.numpy() >= 0]
        fraction = _TRAIN_FRACTION if options.train_fraction is None else options.train_fraction
        train = np.random.default_rng(options.seed).permutation(known)[: round(fraction * len(known))]
        rest = np.setdiff1d(everything, train)
        if len(train) < _FEWEST_TRAINING_ROWS or not len(rest):
            problem = f"{options.data}: {len(train)} rows to train on and {len(rest)} examples are too few"
            raise TaskError(problem, "give more rows with labels, or another train_fraction")
        return train, rest


class _Rows(Examples):
    def __init__(self, table: _Table) -> None:
        self._table, self.class_names = table, table.class_names

    def __len__(self) -> int:
        return len(self._table.examples)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._table.inputs[self._table.examples[list(indices)]]

    def table(self) -> pa.Table:
        """Return the table of examples. The text of a row has its inputs with a value other than 0."""
        table = self._table
        shown = [
            ", ".join(f"{name} {value:.4g}" for name, value in zip(table.input_names, row, strict=True) if value)
            for row in table.inputs[table.examples].tolist()
        ]
        labels = [table.labels[number] for number in table.examples.tolist()]
        rows = table.rows.take(table.examples)
        return example_table(rows, labels, {"text": pa.array(shown, pa.string())}, [table.label_column])


def _own_model(path: str, weights: str | None, n_inputs: int, n_classes: int) -> nn.Module:
    """Return the model of the user, with the weights of a file."""
    module, _, function = path.partition(":")
    if not function:
        raise TaskError(f"model {path!r} is not an import path: write my_package.my_model:make")
    with user_code(f"model {path!r}", module):
        model = getattr(importlib.import_module(module), function)(n_inputs, n_classes)
    if not isinstance(model, nn.Module):
        raise TaskError(f"model {path!r} returns {type(model).__name__}, not a torch.nn.Module: correct the function")
    if weights is not None:
        try:
            model.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise TaskError(f"weights {weights}: {as_one_line(error)}: give the weights of {path!r}") from None
    return model.eval()


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))
