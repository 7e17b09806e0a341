"""A worker's rows of one example each, computed from the stored Fisher factors:

    gradients    unit gradients of the log-probability of the predicted class, folded (`npeff.factorization.rows`)
    squared      squared entries of the factors, summed over their rows

The rows stay in memory, in float64 if they are small and else in float32.

Shapes: N examples, D sketch, E columns of a row (2 D for gradients, D for squared entries).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.execution.process_group import ProcessGroup
from npeff.factorization import DiagonalShard, InvalidProblemError
from npeff.factorization.rows import folded, squared_entries
from npeff.fisher import prediction_gradients
from npeff.options.kinds import RowKind
from npeff.stages.factorize.stored_factors import ShardRows, example_numbers
from npeff.store.fisher_store import FisherStore

_DOUBLE_BYTES = 64 * 2**20
"""Largest size in bytes, in float64 and of all workers, of rows that are processed in float64."""


def gradient_arrays(store: FisherStore) -> tuple[str, ...]:
    """Return the arrays of the Fisher store from which `stored_gradients` computes gradients.

    Raises:
        InvalidProblemError: The stored Fishers do not determine the gradients.
    """
    labels = store.attrs.get("labels", {}).get("kind", "exact")
    if labels == "empirical" and store.rank == 1:
        return ("factors",)
    if labels == "exact" and "logits" in store.array_names and store.n_classes == store.rank + 1:
        return ("factors", "logits")
    raise InvalidProblemError(
        f"the Fishers in {store.path} have no gradients of single predictions: compute Fishers with fishers.labels: "
        "exact or empirical, or choose another factorization.kind"
    )


def stored_gradients(arrays: Mapping[str, NDArray[Any]]) -> Tensor:
    """Return the unit gradients (N, D), float64, of examples with the arrays of `gradient_arrays`."""
    logits = arrays.get("logits")
    logits_NC = None if logits is None else torch.from_numpy(logits)
    return prediction_gradients(torch.from_numpy(arrays["factors"]), logits_NC)


class StoredRows:
    """Reads rows into a `DiagonalShard`. They stay in memory.

    Args:
        kind: kind of the rows.
        store: the Fisher store.
        n_fit: number of fitted examples of all workers.
        device: device of the rows.
    """

    columns_D: NDArray[np.int64] | None = None

    def __init__(self, kind: RowKind, store: FisherStore, n_fit: int, device: torch.device) -> None:
        self._kind, self._store, self.device = kind, store, device
        self._names = ("factors",) if kind == "squared" else gradient_arrays(store)
        width = store.dim * (1 if kind == "squared" else 2)
        self._dtype = torch.float64 if 8 * n_fit * width <= _DOUBLE_BYTES else torch.float32

    def subsample(self, examples_M: NDArray[np.int64]) -> Tensor:
        """Read rows (M, E)."""
        return self._rows(self._store.read_rows(examples_M, self._names))

    def fitted(self, chosen: Sequence[ShardRows], peers: ProcessGroup) -> DiagonalShard:
        """Read the fitted examples, which every pass needs."""
        parts = [self.subsample(np.empty(0, np.int64))]  # gives the width if there are no shards
        for part in chosen:
            stored = self._store.read_shard(part.shard, part.checksum, self._names)
            parts.append(self._rows({name: array[part.rows] for name, array in stored.items()}))
        return DiagonalShard(torch.cat(parts))

    def others(self, chosen: Sequence[ShardRows]) -> DiagonalShard:
        """Read other examples, which only one pass needs, of shards that `fitted` has verified."""
        return DiagonalShard(self.subsample(example_numbers(self._store, chosen)))

    def _rows(self, arrays: Mapping[str, NDArray[Any]]) -> Tensor:
        if self._kind == "squared":
            rows_NE = squared_entries(torch.from_numpy(arrays["factors"]).to(self._dtype))
        else:
            rows_NE = folded(stored_gradients(arrays).to(self._dtype))
        return rows_NE.to(self.device)
