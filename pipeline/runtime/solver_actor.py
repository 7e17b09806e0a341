"""Stage 2 on workers: each holds some shards' Fishers and coefficients; a step is one pass and one all-reduce.

Every worker keeps the whole (small) solver state and advances it by the same arithmetic from the same all-reduced
numbers, so nothing but those numbers is ever sent: K·D + K² + 3 of them per step, however many examples there are.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.factorization import (
    Candidates,
    ExampleShard,
    IterationRecord,
    SolverOptions,
    SolverState,
    Statistics,
    advance,
    canonical_order,
    explained,
    initial_state,
    initialize,
    merge_candidates,
    stopping_reason,
    subsample_indices,
)
from pipeline.runtime.process_group import ProcessGroup
from pipeline.store import Checkpoint, FisherStore, read_table, write_checkpoint_array


@dataclass(frozen=True)
class SolverPaths:
    fishers: Path
    examples: Path


@dataclass(frozen=True)
class SolverResult:
    """The end of a factorization; every worker has the same numbers and its own shards' coefficients."""

    components_KD: NDArray[np.float64]
    coefficients: dict[int, NDArray[np.float32]]
    """Per shard (n, K); NaN rows for invalid examples."""
    loss: float
    explained: float
    explained_held_out: float | None
    """Explained share on the held-out examples, their coefficients fitted with the components fixed; None if none."""
    columns_D: NDArray[np.int64] | None = None
    """Of diagonal entries: where in the flat parameter vector each coordinate of the components is."""


@dataclass
class _LoadedShard:
    """One stored shard, cut into the examples that the components are fitted on, and the others."""

    fit: ExampleShard
    held_out: ExampleShard
    fit_rows: NDArray[np.int64]
    held_out_rows: NDArray[np.int64]
    n_examples: int


class SolverWorker:
    """Worker ``rank`` of ``size``; holds the shards rank, rank + size, …"""

    def __init__(
        self, paths: SolverPaths, options: SolverOptions, device: str, timeout_s: float, rank: int, size: int
    ) -> None:
        self._store = FisherStore.open(paths.fishers)
        table = read_table(paths.examples, "examples")
        valid_N = table["valid"].to_numpy()
        held_out_N = np.asarray(table["split"].to_pylist()) == "held_out"
        self._fit_N, self._held_out_N = valid_N & ~held_out_N, valid_N & held_out_N
        self._options, self._device = options, torch.device(device)
        self._rank, self._size = rank, size
        self._shards: dict[int, _LoadedShard] = {}
        self._state: SolverState | None = None
        self._peers = ProcessGroup(self._device, timeout_s, rank, size)

    def open_rendezvous(self) -> tuple[str, int]:
        """On worker 0: listen, on this node's own address only, for the others."""
        return self._peers.open_rendezvous()

    def connect(self, host: str, port: int) -> None:
        """Form the process group; a peer that is lost later raises, at the latest after the timeout.

        Raises:
            WorkerLostError: not all workers came.
        """
        self._peers.connect(host, port)

    def load(self, checksums: dict[int, str]) -> None:
        """Read and verify this worker's shards.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        for shard in sorted(checksums)[self._rank :: self._size]:
            arrays = self._store.read_shard(shard, checksums[shard])
            bounds = slice(*self._store.plan.bounds(shard))
            fit_rows, held_out_rows = (np.flatnonzero(mask[bounds]) for mask in (self._fit_N, self._held_out_N))
            self._shards[shard] = _LoadedShard(
                fit=self._example_shard(arrays["factors"][fit_rows]),
                held_out=self._example_shard(arrays["factors"][held_out_rows]),
                fit_rows=fit_rows,
                held_out_rows=held_out_rows,
                n_examples=len(arrays["factors"]),
            )

    def initialize(self) -> NDArray[np.float64]:
        """Starting components, from a subsample that depends on the seed and the examples only."""
        fit = np.flatnonzero(self._fit_N)
        chosen = fit[subsample_indices(len(fit), self._options.subsample, self._options.seed)]
        factors_MRD = torch.from_numpy(self._store.read_rows(chosen, ["factors"])["factors"]).to(self._device)
        start_KD = initialize(factors_MRD, self._options.n_components, self._options.seed, self._options.n_starts)
        return start_KD.cpu().numpy()

    def start(self, components_KD: NDArray[np.float64]) -> None:
        """Begin at these components."""
        self._state = initial_state(torch.from_numpy(components_KD.copy()).to(self._device), self._options)

    def resume(self, checkpoint: Checkpoint) -> str | None:
        """Go on from a checkpoint, whatever number of workers wrote it; says if there is no step left to do."""
        self._state = SolverState.from_arrays(checkpoint.arrays).to(self._device)
        for number, shard in self._shards.items():
            coefficients_NK = torch.from_numpy(checkpoint.read(_coefficients_name(number)))
            shard.fit.coefficients_NK = coefficients_NK.to(shard.fit.factors_NRD)
        return stopping_reason(self._state, self._options)

    def step(self) -> tuple[IterationRecord, str | None]:
        """One pass and one step; the reason to stop, if there is one now."""
        state = self._current_state()
        statistics = self._reduced(
            Statistics.zeros(*state.components_KD.shape, device=self._device),
            (shard.fit.accumulate(state.components_KD) for shard in self._shards.values()),
        )
        candidates = self._candidates(state) if bool(statistics.dead_K.any()) else None
        self._state, record = advance(state, statistics, self._options, candidates)
        return record, stopping_reason(self._state, self._options)

    def save(self, folder: Path) -> dict[str, np.ndarray]:
        """Write this worker's coefficients, one file per shard, into a checkpoint's folder; returns the state."""
        for number, shard in self._shards.items():
            assert shard.fit.coefficients_NK is not None, "there is nothing to save before the first step"
            write_checkpoint_array(folder, _coefficients_name(number), shard.fit.coefficients_NK.cpu().numpy())
        return self._current_state().to_arrays()

    def finish(self) -> SolverResult:
        """The best accepted components in canonical order, and coefficients that are optimal for them."""
        best_KD = self._current_state().best_components_KD
        zeros = Statistics.zeros(*best_KD.shape, device=self._device)
        fit = self._reduced(zeros, (shard.fit.finish(best_KD) for shard in self._shards.values()))
        zeros = Statistics.zeros(*best_KD.shape, device=self._device)
        held_out = self._reduced(zeros, (shard.held_out.finish(best_KD) for shard in self._shards.values()))
        order_K, signs_K = canonical_order(best_KD, fit.energy_K)
        loss = fit.loss(best_KD)
        return SolverResult(
            components_KD=(best_KD[order_K] * signs_K[:, None]).cpu().numpy(),
            coefficients={number: _all_rows(shard, order_K) for number, shard in self._shards.items()},
            loss=loss,
            explained=explained(loss, fit.fisher_square_sum),
            explained_held_out=(
                explained(held_out.loss(best_KD), held_out.fisher_square_sum)
                if held_out.fisher_square_sum > 0
                else None
            ),
        )

    def _current_state(self) -> SolverState:
        assert self._state is not None, "start or resume comes first"
        return self._state

    def _example_shard(self, factors_NRD: NDArray[np.float32]) -> ExampleShard:
        return ExampleShard(torch.from_numpy(factors_NRD).to(self._device))

    def _reduced(self, total: Statistics, own: Iterable[Statistics]) -> Statistics:
        """The sum over this worker's shards, then over all workers."""
        for statistics in own:
            total.merge(statistics)
        if self._size == 1:
            return total
        return Statistics.unpack(self._peers.sum_(total.pack()), *total.u_KD.shape)

    def _candidates(self, state: SolverState) -> Candidates:
        """Replacements for dead components, from the worst-fitted examples of all workers."""
        none = Candidates.none(self._store.dim, device=self._device)
        own = [shard.fit.candidates(state.components_KD) for shard in self._shards.values()]
        gathered = self._peers.gathered(merge_candidates([none, *own]).pack())
        return merge_candidates([Candidates.unpack(candidates) for candidates in gathered])


def _coefficients_name(shard: int) -> str:
    return f"coefficients/{shard:05d}"


def _all_rows(shard: _LoadedShard, order_K: Tensor) -> NDArray[np.float32]:
    """Coefficients of a stored shard's examples, in their places; invalid ones are NaN."""
    rows_NK = np.full((shard.n_examples, len(order_K)), np.nan, dtype=np.float32)
    for part, rows in ((shard.fit, shard.fit_rows), (shard.held_out, shard.held_out_rows)):
        assert part.coefficients_NK is not None
        rows_NK[rows] = part.coefficients_NK[:, order_K].float().cpu().numpy()
    return rows_NK
