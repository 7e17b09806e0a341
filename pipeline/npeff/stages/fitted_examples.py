"""Which examples components are fitted on, and with what weights: the same for every worker that must know.

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
    """The Fisher store and the table of examples of a run, and what of the latter a factorization goes by."""

    fishers: Path
    table: Path
    mispredicted_only: bool = False
    """Fit, and report, on no other examples."""
    weight_column: str | None = None
    """Of the table: the examples' weights in the loss; 1 each if None."""

    def read(self) -> tuple[Splits, NDArray[np.float64]]:
        """`of` the table as it is stored."""
        return self.of(read_table(self.table, "examples"))

    def of(self, examples: pa.Table) -> tuple[Splits, NDArray[np.float64]]:
        """The splits, and the weights (N,). Raises InvalidProblemError as `example_weights` does."""
        column = self.weight_column
        weights_N = np.ones(len(examples)) if column is None else example_weights(examples, column)
        return Splits.of(examples, self.mispredicted_only), weights_N


def example_weights(examples: pa.Table, column: str) -> NDArray[np.float64]:
    """The weights (N,) in a column of the table of examples.

    Raises:
        InvalidProblemError: there is no such column, or it holds something else than finite numbers, none negative.
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
