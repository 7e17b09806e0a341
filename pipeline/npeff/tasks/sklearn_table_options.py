"""Options of the task `sklearn-table`, and the data sets of scikit-learn. This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from npeff.tasks.errors import TaskError
from npeff.tasks.labels import LabelOptions

_SHIPPED = "sklearn:"
_DATASETS = {"breast-cancer": "load_breast_cancer", "digits": "load_digits", "iris": "load_iris", "wine": "load_wine"}
_TARGET = "target"
"""Column of the labels in the data sets of scikit-learn."""


@dataclass(frozen=True, kw_only=True)
class SklearnTableOptions(LabelOptions):
    """Options of the task, besides those of all tables. ``data`` may also be ``sklearn:NAME``."""

    label_column: str | None = None
    """Column of labels. The default for ``sklearn:NAME`` is ``target``."""
    numeric_columns: Sequence[str] | None = None
    """Columns of numbers, which are inputs as they are. The default is all columns of numbers and booleans that no
    other option names."""
    category_columns: Sequence[str] | None = None
    """Columns of categories. Each value is an input that is 1 in its rows and 0 in the others."""
    hidden: Sequence[int] | None = None
    """Widths of the hidden layers of the network that the task trains. The default is 32, 32."""
    epochs: int | None = None
    """Number of passes over the training rows. The default is 20."""
    train_fraction: float | None = None
    """Fraction of the rows that the network is trained on. The others are the examples. The default is 0.5."""
    model: str | None = None
    """Import path ``my_package.my_model:make`` of a function of the numbers of inputs and of classes that returns a
    trained model of the user. All rows are then examples."""
    weights: str | None = None
    """Safetensors file with the weights of ``model``."""
    seed: int = 0
    """Seed of the training rows, the initial weights and the order of training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.startswith(_SHIPPED) and self.data.removeprefix(_SHIPPED) not in _DATASETS:
            known = ", ".join(_SHIPPED + name for name in _DATASETS)
            raise TaskError(f"data: scikit-learn has no data set {self.data!r}: use one of {known}, or a file")
        if self.label_column is None and not self.data.startswith(_SHIPPED):
            raise TaskError("label_column is missing: give the column of the classes")
        if self.model is None:
            self._check_training()
            return
        for option in ("hidden", "epochs", "train_fraction"):
            if getattr(self, option) is not None:
                raise TaskError(f"{option} is an option of the network that the task trains: remove it, or model")

    def _check_training(self) -> None:
        if self.weights is not None:
            raise TaskError("weights belong to a model: give model as well")
        for width in self.hidden or ():
            if type(width) is not int or width < 1:
                raise TaskError(f"hidden must be a list of widths of at least 1, not {list(self.hidden or ())!r}")
        if self.epochs is not None and self.epochs < 1:
            raise TaskError(f"epochs must be at least 1, not {self.epochs}")
        if self.train_fraction is not None and not 0 < self.train_fraction < 1:
            raise TaskError(f"train_fraction must be between 0 and 1, not {self.train_fraction}")

    @property
    def label(self) -> str:
        """The column of labels."""
        return self.label_column or _TARGET

    def rows(self) -> pa.Table:
        """Return the rows, with the column ``id`` first. Raises TaskError as `TableOptions.read` does."""
        return self.read(self.category_columns or (), self.label)

    def head(self, most_rows: int) -> pa.Table | None:
        return None if self.data.startswith(_SHIPPED) else super().head(most_rows)

    def _whole(self) -> pa.Table | None:
        if self.data.startswith(_SHIPPED):
            return _shipped(self.data.removeprefix(_SHIPPED))
        return super()._whole()


def _shipped(name: str) -> pa.Table:
    """Return a data set of scikit-learn, with the names of the classes in the column ``target``."""
    from sklearn import datasets

    found = getattr(datasets, _DATASETS[name])()
    columns = {str(column): found.data[:, place] for place, column in enumerate(found.feature_names)}
    return pa.table(columns | {_TARGET: [str(found.target_names[number]) for number in found.target]})
