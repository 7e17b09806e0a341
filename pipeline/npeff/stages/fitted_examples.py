"""The examples that components are fitted on, and their weights. All workers use the same selection.

Shapes: N examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from npeff.factorization import InvalidProblemError
from npeff.store.splits import Splits
from npeff.store.tables import read_table

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class FittedExamples:
    """The Fisher store and the table of examples of a run, and the options that select the fitted examples."""

    fishers: Path
    table: Path
    mispredicted_only: bool = False
    """Use only mispredicted examples for the fit and for the held-out evaluation."""
    weight_column: str | None = None
    """Column of the table with the weights of the examples in the loss. All weights are 1 if None."""

    def read(self) -> tuple[Splits, NDArray[np.float64]]:
        """Return the splits and the weights (N,) of the stored table."""
        return self.of(read_table(self.table, "examples"))

    def of(self, examples: pa.Table) -> tuple[Splits, NDArray[np.float64]]:
        """Return the splits and the weights (N,) of a table of examples.

        Raises:
            InvalidProblemError: as `example_weights`.
        """
        column = self.weight_column
        weights_N = np.ones(len(examples)) if column is None else example_weights(examples, column)
        return Splits.of(examples, self.mispredicted_only), weights_N


def example_weights(examples: pa.Table, column: str) -> NDArray[np.float64]:
    """Return the weights (N,) in a column of the table of examples.

    Raises:
        InvalidProblemError: the column does not exist, or a value is not a finite number ≥ 0.
    """
    if column not in examples.column_names:
        raise InvalidProblemError(
            f"the examples have no column {column!r} for factorization.example_weights: name one of "
            f"{', '.join(examples.column_names)}"
        )
    try:
        weights_N = examples[column].to_numpy().astype(np.float64)
    except (TypeError, ValueError):
        weights_N = np.array([np.nan])
    if not bool((np.isfinite(weights_N) & (weights_N >= 0)).all()):
        raise InvalidProblemError(
            f"column {column!r} cannot be factorization.example_weights: every weight must be a finite number, 0 or "
            "more"
        )
    result: NDArray[np.float64] = weights_N
    return result
