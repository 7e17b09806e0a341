"""A worker's diagonal Fishers from the store, as the rows that D-NPEFF factorizes:

    diagonal_groups    the stored sums over groups, divided by their length ‖·‖₂ for each example
    diagonal_entries   the stored largest entries of f_i/‖f_i‖₂; each entry of a fitted example is a column

Entries of other examples that are in no column count as unexplained. Small data are processed in float64, which costs
little and makes losses more precise. Large data are processed in float32, in which they are stored.

Shapes: N examples, k largest entries, P columns (entries or groups), D the same in `SolverResult`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.execution.process_group import ProcessGroup
from npeff.factorization import DiagonalShard, entries_by_column
from npeff.options.kinds import DiagonalKind
from npeff.stages.factorize.stored_factors import ShardRows, example_numbers
from npeff.store.fisher_store import FisherStore

_ARRAYS: dict[DiagonalKind, tuple[str, ...]] = {
    "diagonal_groups": ("grouped_diagonal",),
    "diagonal_entries": ("diagonal_values", "diagonal_indices"),
}

_DOUBLE_BYTES = 64 * 2**20
"""Largest size in bytes, in float64 and of all workers, of data that are processed in float64."""


class StoredDiagonals:
    """Reads diagonals into a `DiagonalShard`. They stay in memory.

    Args:
        kind: kind of the diagonals.
        store: the Fisher store.
        n_fit: number of fitted examples of all workers.
        device: device of ``diagonal_groups``. ``diagonal_entries`` are on the CPU, because SciPy computes with them.
    """

    def __init__(self, kind: DiagonalKind, store: FisherStore, n_fit: int, device: torch.device) -> None:
        self._kind, self._store = kind, store
        self.device = torch.device("cpu") if kind == "diagonal_entries" else device
        width = store.n_groups if kind == "diagonal_groups" else store.top_entries
        self._dtype = np.float64 if 8 * n_fit * (width or 1) <= _DOUBLE_BYTES else np.float32
        self.columns_D: NDArray[np.int64] | None = None
        """Position of each column in the flat parameter vector, ascending, for ``diagonal_entries``."""

    def subsample(self, examples_M: NDArray[np.int64]) -> Any:
        """Read rows (M, P), dense or sparse."""
        return self._rows(self._read(examples_M))[0]

    def fitted(self, chosen: Sequence[ShardRows], peers: ProcessGroup) -> DiagonalShard:
        """Read the fitted examples, which every pass needs, and determine the columns together with all workers."""
        arrays = {name: [array] for name, array in self._read([]).items()}  # gives widths if there are no shards
        for part in chosen:
            stored = self._store.read_shard(part.shard, part.checksum, _ARRAYS[self._kind])
            for name, parts in arrays.items():
                parts.append(stored[name][part.rows])
        joined = {name: np.concatenate(parts) for name, parts in arrays.items()}
        if self._kind == "diagonal_entries":
            used = joined["diagonal_indices"][joined["diagonal_values"] > 0]
            self.columns_D = peers.union(torch.from_numpy(np.unique(used))).numpy()
        return self._shard(joined)

    def others(self, chosen: Sequence[ShardRows]) -> DiagonalShard:
        """Read other examples, which only one pass needs, of shards that `fitted` has verified."""
        return self._shard(self._read(example_numbers(self._store, chosen)))

    def _read(self, examples_N: Sequence[int] | NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return self._store.read_rows(examples_N, _ARRAYS[self._kind])

    def _shard(self, arrays: dict[str, NDArray[Any]]) -> DiagonalShard:
        rows_NP, outside_N = self._rows(arrays)
        return DiagonalShard(rows_NP, outside_N=outside_N)

    def _rows(self, arrays: dict[str, NDArray[Any]]) -> tuple[Any, Tensor | None]:
        """Return the rows to factorize, and the sums of squares (N,) of entries that are in no column."""
        if self._kind == "diagonal_groups":
            rows_NP = torch.from_numpy(arrays["grouped_diagonal"].astype(self._dtype, copy=False)).to(self.device)
            return torch.nn.functional.normalize(rows_NP, dim=1), None
        assert self.columns_D is not None, "fitted comes first"
        values_Nk = arrays["diagonal_values"].astype(self._dtype, copy=False)
        return entries_by_column(values_Nk, arrays["diagonal_indices"], self.columns_D)
