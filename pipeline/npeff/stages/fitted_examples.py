"""The examples that components are fitted on, and their weights. All workers use the same selection.

Shapes: N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.factorization import InvalidProblemError
from npeff.store.splits import Splits
from npeff.store.tables import column_names, read_table

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class FittedExamples:
    """The Fisher store and the table of examples of a run, and the options that select the fitted examples."""

    fishers: Path
    table: Path
    chosen: Literal["all", "mispredicted", "uncertain"] = "all"
    """Examples that are used for the fit and for the held-out evaluation."""
    max_probability: float | None = None
    """The largest class probability of ``uncertain`` examples is below this number."""
    weight_column: str | None = None
    """Column of the table with the weights of the examples in the loss. All weights are 1 if None."""

    def read(self) -> tuple[Splits, NDArray[np.float64]]:
        """Return the splits and the weights (N,) of the stored table."""
        return self.of(self.read_examples())

    def read_examples(self, *more: str) -> pa.Table:
        """Return the columns of the stored table that `of` needs, and more.

        Raises:
            InvalidProblemError: There is no column of the weights.
        """
        needed = {"mispredicted": ["correct"], "uncertain": ["logits"]}.get(self.chosen, [])
        names = column_names(self.table, "examples")
        if self.weight_column is not None and self.weight_column not in names:
            raise _no_weights(self.weight_column, names)
        weights = [] if self.weight_column is None else [self.weight_column]
        return read_table(self.table, "examples", list(dict.fromkeys(["split", "valid", *needed, *weights, *more])))

    def of(self, examples: pa.Table) -> tuple[Splits, NDArray[np.float64]]:
        """Return the splits and the weights (N,) of a table of examples.

        Raises:
            InvalidProblemError: as `example_weights` and `largest_probabilities`.
        """
        column = self.weight_column
        weights_N = np.ones(len(examples)) if column is None else example_weights(examples, column)
        counts_N = None
        if self.chosen == "mispredicted":
            counts_N = ~pc.fill_null(examples["correct"], True).to_numpy()
        elif self.chosen == "uncertain":
            assert self.max_probability is not None
            counts_N = largest_probabilities(examples) < self.max_probability
        return Splits.of(examples, counts_N), weights_N


def largest_probabilities(examples: pa.Table) -> NDArray[np.float64]:
    """Return the largest class probability (N,) of each example of the table, NaN for logits that are not finite.

    Raises:
        InvalidProblemError: the table has no logits.
    """
    logits = examples["logits"].combine_chunks()
    if logits.null_count:
        raise InvalidProblemError(
            "factorization.examples: uncertain needs one prediction among at most 4,096 classes for each example, and "
            "the logits of these examples are not stored: set factorization.examples: all"
        )
    logits_NC = logits.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(examples), -1)
    with np.errstate(invalid="ignore"):
        exponentials_NC = np.exp(logits_NC - logits_NC.max(axis=1, keepdims=True))
    found_N: NDArray[np.float64] = 1 / exponentials_NC.sum(axis=1)
    return found_N


def _no_weights(column: str, names: Sequence[str]) -> InvalidProblemError:
    return InvalidProblemError(
        f"the examples have no column {column!r} for factorization.example_weights: name one of {', '.join(names)}"
    )


def example_weights(examples: pa.Table, column: str) -> NDArray[np.float64]:
    """Return the weights (N,) in a column of the table of examples.

    Raises:
        InvalidProblemError: the column does not exist, or a value is not a finite number ≥ 0.
    """
    if column not in examples.column_names:
        raise _no_weights(column, examples.column_names)
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
