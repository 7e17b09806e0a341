"""Stage 2 for diagonal Fishers on workers: each holds some shards' examples; a step is one pass and one all-reduce.

The methods are those of `SolverWorker`, so that the same driver runs them. The rows that are factorized are

    diagonal_groups    the stored sums over groups, each example's divided by their length ‖·‖₂
    diagonal_entries   the stored largest entries of f_i/‖f_i‖₂; a column is an entry that an example fitted on has

Entries of held-out examples in no column count as unexplained. Small data are worked on in float64, where it costs
nothing and losses are exact to more digits; large data in float32, as they are stored.

Shapes: N examples, k largest entries, P columns (entries or groups), K components.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.execution.process_group import ProcessGroup, ProcessGroupMember
from npeff.factorization import (
    Candidates,
    DiagonalShard,
    DiagonalState,
    DiagonalStatistics,
    SolverOptions,
    advance_diagonal,
    canonical_order,
    diagonal_stopping_reason,
    entries_by_column,
    explained,
    initial_diagonal_state,
    initialize_diagonal,
    merge_candidates,
    subsample_indices,
    unit_components,
)
from npeff.stages.factorize.worker import SolverResult, Step, coefficients_name
from npeff.stages.fitted_examples import FittedExamples
from npeff.store.checkpoint import Checkpoint, write_checkpoint_array
from npeff.store.fisher_store import FisherStore

DiagonalKind = Literal["diagonal_groups", "diagonal_entries"]

_ARRAYS: dict[str, tuple[str, ...]] = {
    "diagonal_groups": ("grouped_diagonal",),
    "diagonal_entries": ("diagonal_values", "diagonal_indices"),
}


_DOUBLE_BYTES = 64 * 2**20
"""Data of all workers that take no more than this in float64 are worked on in it."""


@dataclass(frozen=True)
class _Part:
    """The fitted, or the held-out, examples of all shards of a worker, one after the other."""

    examples: DiagonalShard
    rows: dict[int, NDArray[np.int64]]
    """Per stored shard, by number: which of its examples, counted from its first."""

    def by_shard(self) -> dict[int, Tensor]:
        """The coefficients of each stored shard."""
        lengths = [len(rows) for rows in self.rows.values()]
        return dict(zip(self.rows, self.examples.coefficients_NK.split(lengths), strict=True))


class DiagonalSolverWorker(ProcessGroupMember):
    """Worker ``rank`` of ``size``; holds the shards rank, rank + size, …"""

    def __init__(
        self,
        kind: DiagonalKind,
        examples: FittedExamples,
        options: SolverOptions,
        device: str,
        timeout_s: float,
        rank: int,
        size: int,
    ) -> None:
        # Sparse products are SciPy's.
        self._device = torch.device("cpu" if kind == "diagonal_entries" else device)
        super().__init__(ProcessGroup(self._device, timeout_s, rank, size))
        self._store, (self._splits, _) = FisherStore.open(examples.fishers), examples.read()
        self._kind, self._options = kind, options
        width = self._store.n_groups if kind == "diagonal_groups" else self._store.top_entries
        small = 8 * int(self._splits.fit_N.sum()) * (width or 1) <= _DOUBLE_BYTES
        self._dtype = np.float64 if small else np.float32
        self._columns_P: Tensor | None = None
        """Of entries: where in the flat parameter vector each column is, ascending."""
        self._shards: list[int] = []
        self._fit: _Part | None = None
        self._held_out: _Part | None = None
        self._state: DiagonalState | None = None

    def load(self, checksums: dict[int, str]) -> None:
        """Read and verify this worker's shards; all workers together say what the columns are.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        self._shards = sorted(checksums)[self._peers.rank :: self._peers.size]
        masks = (self._splits.fit_N, self._splits.held_out_N)
        fit_rows, held_out_rows = ({n: self._chosen(n, mask) for n in self._shards} for mask in masks)
        fit, held_out = [_no_rows(self._store, self._kind)], [_no_rows(self._store, self._kind)]
        for shard in self._shards:
            stored = self._store.read_shard(shard, checksums[shard])
            fit.append({name: stored[name][fit_rows[shard]] for name in _ARRAYS[self._kind]})
            held_out.append({name: stored[name][held_out_rows[shard]] for name in _ARRAYS[self._kind]})
        fit_arrays, held_out_arrays = _joined(fit), _joined(held_out)
        if self._kind == "diagonal_entries":
            used = fit_arrays["diagonal_indices"][fit_arrays["diagonal_values"] > 0]
            self._columns_P = self._peers.union(torch.from_numpy(np.unique(used)))
        self._fit = _Part(self._shard_of(fit_arrays), fit_rows)
        self._held_out = _Part(self._shard_of(held_out_arrays), held_out_rows)

    def initialize(self) -> NDArray[Any]:
        """Starting components, from a subsample that depends on the seed and the examples only."""
        fit = np.flatnonzero(self._splits.fit_N)
        chosen = fit[subsample_indices(len(fit), self._options.subsample, self._options.seed)]
        rows_MP, _ = self._rows(self._store.read_rows(chosen, _ARRAYS[self._kind]))
        options = self._options
        return initialize_diagonal(rows_MP, options.n_components, options.seed, options.n_starts).cpu().numpy()

    def start(self, components_KP: NDArray[Any]) -> None:
        """Begin at these components."""
        self._state = initial_diagonal_state(torch.from_numpy(components_KP.copy()).to(self._device), self._options)

    def resume(self, checkpoint: Checkpoint) -> str | None:
        """Go on from a checkpoint, whatever number of workers wrote it; says if there is no step left to do."""
        self._state = DiagonalState.from_arrays(checkpoint.arrays).to(self._device)
        examples = self._loaded(self._fit).examples
        stored = [torch.from_numpy(checkpoint.read(coefficients_name(shard))) for shard in self._shards]
        if stored:
            examples.coefficients_NK = torch.cat(stored).to(examples.coefficients_NK)
        return diagonal_stopping_reason(self._state, self._options)

    def step(self) -> Step:
        """One pass and one step."""
        state, examples, sent_before = self._current_state(), self._loaded(self._fit).examples, self._peers.sent_bytes
        statistics = self._reduced(examples.accumulate(state.components_KP))
        candidates = None
        if bool(statistics.dead_K(state.components_KP).any()):
            packed = self._peers.gathered(examples.candidates(state.components_KP).pack())
            candidates = merge_candidates([Candidates.unpack(part) for part in packed])
        self._state, record = advance_diagonal(state, statistics, self._options, candidates)
        examples.settle(record.accepted)
        return Step(record, diagonal_stopping_reason(self._state, self._options), self._peers.sent_bytes - sent_before)

    def save(self, folder: Path) -> dict[str, np.ndarray]:
        """Write this worker's coefficients, one file per shard, into a checkpoint's folder; returns the state."""
        for shard, coefficients_NK in self._loaded(self._fit).by_shard().items():
            write_checkpoint_array(folder, coefficients_name(shard), coefficients_NK.cpu().numpy())
        return self._current_state().to_arrays()

    def finish(self) -> SolverResult:
        """The best accepted components as unit rows in canonical order, and coefficients that are optimal for them."""
        components_KP, lengths_K = unit_components(self._current_state())
        fit, held_out = self._loaded(self._fit), self._loaded(self._held_out)
        fit.examples.rescale(lengths_K)
        fitted = self._reduced(fit.examples.finish(components_KP))
        other = self._reduced(held_out.examples.finish(components_KP))
        order_K, _ = canonical_order(components_KP, fitted.ww_KK.diagonal())
        loss = fitted.loss(components_KP)
        return SolverResult(
            components_KD=components_KP[order_K].cpu().numpy(),
            coefficients=self._all_coefficients(order_K),
            loss=loss,
            objective=loss,
            explained=explained(loss, fitted.square_sum),
            explained_held_out=(
                explained(other.loss(components_KP), other.square_sum) if other.square_sum > 0 else None
            ),
            columns_D=None if self._columns_P is None else self._columns_P.numpy(),
        )

    def _chosen(self, shard: int, mask_N: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.flatnonzero(mask_N[slice(*self._store.plan.bounds(shard))])

    def _shard_of(self, arrays: dict[str, NDArray[Any]]) -> DiagonalShard:
        rows_NP, outside_N = self._rows(arrays)
        return DiagonalShard(rows_NP, outside_N=outside_N)

    def _rows(self, arrays: dict[str, NDArray[Any]]) -> tuple[Any, Tensor | None]:
        """Stored examples as the rows to factorize, and the squares of what lies in no column."""
        if self._kind == "diagonal_groups":
            rows_NP = torch.from_numpy(arrays["grouped_diagonal"].astype(self._dtype, copy=False)).to(self._device)
            return torch.nn.functional.normalize(rows_NP, dim=1), None
        assert self._columns_P is not None, "load comes first"
        values_Nk = arrays["diagonal_values"].astype(self._dtype, copy=False)
        return entries_by_column(values_Nk, arrays["diagonal_indices"], self._columns_P.numpy())

    def _reduced(self, own: DiagonalStatistics) -> DiagonalStatistics:
        """The sum over all workers."""
        if self._peers.size == 1:
            return own
        return DiagonalStatistics.unpack(self._peers.sum_(own.pack()), *own.wx_KP.shape)

    def _all_coefficients(self, order_K: Tensor) -> dict[int, NDArray[np.float32]]:
        """Coefficients of every stored shard's examples, in their places; invalid ones are NaN."""
        found: dict[int, NDArray[np.float32]] = {}
        for shard in self._shards:
            start, stop = self._store.plan.bounds(shard)
            found[shard] = np.full((stop - start, len(order_K)), np.nan, dtype=np.float32)
        for part in (self._loaded(self._fit), self._loaded(self._held_out)):
            for shard, coefficients_NK in part.by_shard().items():
                found[shard][part.rows[shard]] = coefficients_NK[:, order_K].float().cpu().numpy()
        return found

    def _current_state(self) -> DiagonalState:
        assert self._state is not None, "start or resume comes first"
        return self._state

    @staticmethod
    def _loaded(part: _Part | None) -> _Part:
        assert part is not None, "load comes first"
        return part


def _no_rows(store: FisherStore, kind: DiagonalKind) -> dict[str, NDArray[Any]]:
    """Of a worker without shards too, arrays have a width and a type."""
    return store.read_rows([], _ARRAYS[kind])


def _joined(parts: list[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
