"""The worker of the stage `factorize`. Each worker has the Fishers and coefficients of some shards; a step is one pass
over them and one all-reduce.

Every worker keeps the whole (small) solver state and advances it by the same arithmetic from the same all-reduced
numbers, so that only these numbers are sent. Their count does not depend on the number of examples: K·D + K² and a few
more in each step.

`npeff.factorization.kind` defines a step for each kind of Fisher; `StoredFishers` reads the Fishers.

Shapes: N examples, D dimension of a Fisher (sketch, groups or entries), K components.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.execution.process_group import ProcessGroup, ProcessGroupMember
from npeff.factorization import (
    Candidates,
    DiagonalFishers,
    FisherKind,
    IterationRecord,
    LowRankFishers,
    SolverOptions,
    canonical_order,
    explained,
    merge_candidates,
    subsample_indices,
)
from npeff.options.kinds import DiagonalKind, RowKind
from npeff.stages.factorize.packed_rows import write_rows
from npeff.stages.factorize.stored_diagonals import StoredDiagonals
from npeff.stages.factorize.stored_factors import ShardRows, StoredFactors
from npeff.stages.factorize.stored_rows import StoredRows
from npeff.stages.fitted_examples import FittedExamples
from npeff.store.checkpoint import Checkpoint, write_checkpoint_array
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardChecksums


@dataclass(frozen=True)
class Origin:
    """Components of another run that the solver starts from."""

    components_KD: NDArray[np.float64]
    frozen: bool
    """Whether these components stay fixed while the solver fits further components."""


@dataclass(frozen=True)
class SolverResult:
    """The result of a factorization, which is the same on all workers."""

    components_KD: NDArray[np.float64]
    loss: float
    objective: float
    """The loss plus the penalties."""
    explained: float
    explained_held_out: float | None
    """Explained fraction of the held-out examples, with coefficients fitted for the fixed components. None without
    held-out examples."""
    columns_D: NDArray[np.int64] | None = None
    """Position of each coordinate of the components in the flat parameter vector, for ``diagonal_entries``."""
    has_evidence: bool = False
    """Whether the evidence is written, as it is for the kind ``fishers``."""


@dataclass(frozen=True)
class Step:
    """The result of an iteration. It is the same on all workers if their processors are of one type."""

    record: IterationRecord
    stopped: str | None
    """The reason to stop after this step, or None."""
    sent_bytes: int
    """Total size in bytes of the tensors that this worker passed to the step's collective operations."""


class StoredFishers(Protocol):
    """Reads the Fishers of one kind from the store into shards of that kind."""

    device: torch.device
    """Device of the Fishers."""
    columns_D: NDArray[np.int64] | None
    """As in `SolverResult`. Set by `fitted`."""

    def subsample(self, examples_M: NDArray[np.int64]) -> Any:
        """Read the Fishers of these examples as an argument of `FisherKind.candidates`."""
        ...

    def fitted(self, chosen: Sequence[ShardRows], peers: ProcessGroup) -> Any:
        """Read the fitted examples, which every pass needs. This is a collective operation of all workers.

        Raises:
            StoreError: a stored shard is missing or damaged.
        """
        ...

    def others(self, chosen: Sequence[ShardRows]) -> Any:
        """Read other examples, which only one pass needs."""
        ...


class SolverWorker(ProcessGroupMember):
    """Worker ``rank`` of ``size``, with the shards rank, rank + size, …

    Args:
        examples: the examples to fit on, and the other examples whose coefficients are computed at the end.
        options: options of the solver.
        device: device to compute on.
        timeout_s: timeout in seconds of the collective operations.
        memory_limit_bytes: low-rank Fishers that need more memory are read from the store in every pass. The results
            have the same bits, because the blocks have the same shapes. Diagonals and coefficients stay in memory.
        rank: rank of this worker.
        size: number of workers.
        origin: components of another run to start from.
        kind: kind of the Fishers to factorize.
    """

    def __init__(
        self,
        examples: FittedExamples,
        options: SolverOptions,
        device: str,
        timeout_s: float,
        memory_limit_bytes: int,
        rank: int,
        size: int,
        origin: Origin | None = None,
        kind: Literal["fishers", DiagonalKind, RowKind] = "fishers",
    ) -> None:
        self._store = FisherStore.open(examples.fishers)
        self._splits, weights_N = examples.read()
        self._weights_N = torch.from_numpy(weights_N)
        self._origin, self._options = origin, options
        self._kind: FisherKind[Any, Any, Any]
        self._stored: StoredFishers
        if kind == "fishers":
            self._kind = LowRankFishers(options)
            self._stored = StoredFactors(self._store, self._weights_N, torch.device(device), memory_limit_bytes)
        else:
            n_fit = int(self._splits.fit_N.sum())
            self._kind = DiagonalFishers(options)
            if kind == "gradients" or kind == "squared":
                self._stored = StoredRows(kind, self._store, n_fit, torch.device(device))
            else:
                self._stored = StoredDiagonals(kind, self._store, n_fit, torch.device(device))
        super().__init__(ProcessGroup(self._stored.device, timeout_s, rank, size))
        self._fit: list[ShardRows] = []
        self._held_out: list[ShardRows] = []
        self._others: list[ShardRows] = []
        """Fitted, held-out and other examples of this worker's shards."""
        self._examples: Any = None
        """The fitted examples, as a shard of the kind."""
        self._state: Any = None

    def load(self, checksums: dict[int, ShardChecksums]) -> None:
        """Read and verify this worker's shards.

        Raises:
            StoreError: a shard is missing or damaged.
        """
        for shard in sorted(checksums)[self._peers.rank :: self._peers.size]:
            bounds = slice(*self._store.plan.bounds(shard))
            parts = (
                (self._fit, self._splits.fit_N),
                (self._held_out, self._splits.held_out_N),
                (self._others, self._splits.others_N),
            )
            for own, chosen_N in parts:
                own.append(ShardRows(shard, checksums[shard], np.flatnonzero(chosen_N[bounds])))
        self._examples = self._stored.fitted(self._fit, self._peers)

    def initialize(self) -> NDArray[Any]:
        """Return candidates for the initial components, or the components of another run to start from.

        The candidates are computed from a subsample that depends only on the seed and the examples.
        """
        if self._origin is not None and not self._origin.frozen:
            return self._origin.components_KD
        fit = np.flatnonzero(self._splits.fit_N & (self._weights_N.numpy() > 0))
        chosen = fit[subsample_indices(len(fit), self._options.subsample, self._options.seed)]
        subsample = self._stored.subsample(chosen)
        frozen_KD = torch.from_numpy(self._origin.components_KD.copy()) if self._origin is not None else None
        weights_M = self._weights_N[chosen].to(self._stored.device)
        return self._kind.candidates(subsample, weights_M, frozen_KD).cpu().numpy()

    def start(self, candidates_CD: NDArray[Any]) -> None:
        """Initialize the state with these candidates. If there are too many, the most useful ones are chosen."""
        candidates = torch.from_numpy(candidates_CD.copy()).to(self._stored.device)
        self._state = self._kind.start(self._fitted(), candidates, self._peers)

    def resume(self, checkpoint: Checkpoint) -> str | None:
        """Resume from a checkpoint of any number of workers. Returns the reason to stop, or None."""
        self._state = self._kind.restore(checkpoint.arrays).to(self._stored.device)
        if self._fit:
            fit, stored = self._fitted(), self._checkpointed(checkpoint)
            own = [torch.from_numpy(stored[shard.shard]) for shard in self._fit]
            fit.coefficients_NK = torch.cat(own).to(fit.coefficients_NK)
        return self._kind.stopping_reason(self._state)

    def step(self) -> Step:
        """Make one pass over the examples and one step of the solver."""
        kind, state, examples, sent_before = self._kind, self._current_state(), self._fitted(), self._peers.sent_bytes
        sums = self._reduced(kind.accumulate(examples, state))
        offered = self._replacements() if bool(kind.dead_K(sums, state).any()) else None
        self._state, record = kind.advance(state, sums, offered)
        kind.settle(examples, record.accepted)
        return Step(record, kind.stopping_reason(self._state), self._peers.sent_bytes - sent_before)

    def save(self, folder: Path) -> dict[str, np.ndarray]:
        """Write this worker's coefficients to a file of a checkpoint's folder. Returns the solver state."""
        name = coefficients_name(self._peers.rank, self._peers.size)
        write_checkpoint_array(folder, name, self._fitted().coefficients_NK.cpu().numpy())
        arrays: dict[str, np.ndarray] = self._current_state().to_arrays()
        return arrays

    def finish(self, folder: Path) -> SolverResult:
        """Return the best accepted components in canonical order.

        The optimal coefficients of this worker's examples for them, and the evidence, are written to the folder, as
        `packed_rows` states. The rows of invalid examples are NaN.
        """
        kind, state = self._kind, self._current_state()
        fitted, held_out, others = (
            self._fitted(),
            *(self._stored.others(chosen) for chosen in (self._held_out, self._others)),
        )
        sums, held_out_sums = (self._reduced(kind.finish(part, state)) for part in (fitted, held_out))
        kind.finish(others, state)
        best_KD = kind.best_components(state)
        order_K, signs_K = canonical_order(best_KD, sums.ww_KK.diagonal(), self._options.n_frozen)
        loss = sums.loss(best_KD)
        parts = (fitted, held_out, others)
        has_evidence = isinstance(kind, LowRankFishers)
        for name in ("coefficients", *(["evidence"] if has_evidence else [])):
            rows = self._of_all_shards([getattr(part, f"{name}_NK") for part in parts], order_K)
            write_rows(folder, name, self._peers.rank, self._peers.size, rows)
        return SolverResult(
            components_KD=(best_KD[order_K] * signs_K[:, None]).cpu().numpy(),
            has_evidence=has_evidence,
            loss=loss,
            objective=loss + kind.penalties(sums, best_KD),
            explained=explained(loss, sums.fisher_square_sum),
            explained_held_out=(
                explained(held_out_sums.loss(best_KD), held_out_sums.fisher_square_sum)
                if held_out_sums.fisher_square_sum > 0
                else None
            ),
            columns_D=self._stored.columns_D,
        )

    def _checkpointed(self, checkpoint: Checkpoint) -> dict[int, NDArray[np.float32]]:
        """Return the stored coefficients of at least this worker's shards, whatever number of workers wrote them."""
        found: dict[int, NDArray[np.float32]] = {}
        own = {part.shard for part in self._fit}
        for name in checkpoint.names:
            if (match := _COEFFICIENTS.fullmatch(name)) is None:
                continue
            rank, size = int(match[1]), int(match[2] or 0)
            shards = range(rank, self._store.plan.n_shards, size) if size else [rank]  # a file of one shard: version 1
            if own.isdisjoint(shards):
                continue
            rows_NK, start = checkpoint.read(name), 0
            for shard in shards:
                stop = start + int(self._splits.fit_N[slice(*self._store.plan.bounds(shard))].sum())
                found[shard] = rows_NK[start:stop]
                start = stop
        return found

    def _current_state(self) -> Any:
        assert self._state is not None, "start or resume comes first"
        return self._state

    def _fitted(self) -> Any:
        assert self._examples is not None, "load comes first"
        return self._examples

    def _of_all_shards(self, values: Sequence[Tensor], order_K: Tensor) -> NDArray[np.float32]:
        """Return values (n, K) of all examples of this worker's shards. Rows of invalid examples are NaN.

        Args:
            values: values (n, K) of the fitted, of the held-out and of the other examples.
            order_K: order of the components.
        """
        bounds = [self._store.plan.bounds(rows.shard) for rows in self._fit]
        starts = np.cumsum([0, *(stop - start for start, stop in bounds)])
        found_nK = np.full((starts[-1], len(order_K)), np.nan, dtype=np.float32)
        for chosen, values_nK in zip((self._fit, self._held_out, self._others), values, strict=True):
            of_shards = values_nK.split([len(each.rows) for each in chosen])
            for rows, start, of_shard_nK in zip(chosen, starts, of_shards, strict=False):
                found_nK[start + rows.rows] = of_shard_nK[:, order_K].float().cpu().numpy()
        return found_nK

    def _reduced(self, own: Any) -> Any:
        """Return the sum over all workers."""
        if self._peers.size == 1:
            return own
        return self._kind.unpacked(self._peers.sum_(own.pack()), self._current_state())

    def _replacements(self) -> Candidates:
        """Return replacements of dead components, from the worst-fitted examples of all workers."""
        own = self._kind.replacements(self._fitted(), self._current_state())
        return merge_candidates([Candidates.unpack(packed) for packed in self._peers.gathered(own.pack())])


_COEFFICIENTS = re.compile(r"coefficients(?:/|-)([0-9]+)(?:-of-([0-9]+))?")


def coefficients_name(rank: int, size: int) -> str:
    """Return the name of a worker's coefficients in a checkpoint."""
    return f"coefficients-{rank:05d}-of-{size:05d}"
