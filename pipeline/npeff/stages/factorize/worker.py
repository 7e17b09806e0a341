"""Stage 2 on workers: each has some shards' Fishers and coefficients; a step is one pass and one all-reduce.

Every worker keeps the whole (small) solver state and advances it by the same arithmetic from the same all-reduced
numbers, so nothing but those numbers is ever sent: K·D + K² + 4 of them per step, however many examples there are.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.execution.process_group import ProcessGroup, ProcessGroupMember
from npeff.factorization import (
    Candidates,
    ExampleShard,
    IterationRecord,
    SolverOptions,
    SolverState,
    Statistics,
    advance,
    candidate_components,
    canonical_order,
    explained,
    free_dead,
    initial_state,
    merge_candidates,
    most_useful,
    stopping_reason,
    subsample_indices,
)
from npeff.stages.factorize.stored_factors import ShardRows, stored_factors
from npeff.stages.fitted_examples import FittedExamples
from npeff.store.checkpoint import Checkpoint, write_checkpoint_array
from npeff.store.fisher_store import FisherStore


@dataclass(frozen=True)
class Origin:
    """Components of another run, to start from."""

    components_KD: NDArray[np.float64]
    frozen: bool
    """Whether they are to stay, with others beside them."""


@dataclass(frozen=True)
class SolverResult:
    """The end of a factorization; every worker has the same numbers and its own shards' coefficients."""

    components_KD: NDArray[np.float64]
    coefficients: dict[int, NDArray[np.float32]]
    """Per shard (n, K); NaN rows for invalid examples."""
    loss: float
    objective: float
    """The loss with the penalties."""
    explained: float
    explained_held_out: float | None
    """Explained share on the held-out examples, their coefficients fitted with the components fixed; None if none."""
    columns_D: NDArray[np.int64] | None = None
    """Of diagonal entries: where in the flat parameter vector each coordinate of the components is."""


@dataclass(frozen=True)
class Step:
    """What an iteration came to; every worker says the same where their processors are of one type."""

    record: IterationRecord
    stopped: str | None
    """The reason to stop, if there is one now."""
    sent_bytes: int
    """What this worker gave to the collective operations of the step: the size of their tensors."""


class SolverWorker(ProcessGroupMember):
    """Worker ``rank`` of ``size``; has the shards rank, rank + size, …

    Its Fishers stay in memory where they take no more than `memory_limit_bytes`, and are read from the store in every
    pass where they would take more; the results are the same bits, because the blocks have the same shapes. Its
    coefficients stay in memory.
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
    ) -> None:
        self._device = torch.device(device)
        super().__init__(ProcessGroup(self._device, timeout_s, rank, size))
        self._store = FisherStore.open(examples.fishers)
        self._splits, weights_N = examples.read()
        self._weights_N = torch.from_numpy(weights_N)
        self._origin, self._options = origin, options
        self._memory_limit_bytes = memory_limit_bytes
        self._fit: list[ShardRows] = []
        self._held_out: list[ShardRows] = []
        self._others: list[ShardRows] = []
        """Of this worker's shards: the examples that the components are fitted on, those held out, and the others."""
        self._examples: ExampleShard | None = None
        """The first."""
        self._state: SolverState | None = None

    def load(self, checksums: dict[int, str]) -> None:
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
        self._examples = self._example_shard(self._fit, self._memory_limit_bytes)

    def initialize(self) -> NDArray[np.float64]:
        """Candidates for the components to start from, of a subsample that depends on the seed and the examples only;
        or the components of another run."""
        if self._origin is not None and not self._origin.frozen:
            return self._origin.components_KD
        fit = np.flatnonzero(self._splits.fit_N & (self._weights_N.numpy() > 0))
        chosen = fit[subsample_indices(len(fit), self._options.subsample, self._options.seed)]
        factors_MRD = torch.from_numpy(self._store.read_rows(chosen, ["factors"])["factors"]).to(self._device)
        frozen_KD = torch.from_numpy(self._origin.components_KD.copy()) if self._origin is not None else None
        weights_M = self._weights_N[chosen].to(self._device)
        return candidate_components(factors_MRD, self._options, weights_M, frozen_KD).cpu().numpy()

    def start(self, candidates_CD: NDArray[np.float64]) -> None:
        """Begin at these components, or at the most useful ones where they are more than are asked for."""
        candidates, options = torch.from_numpy(candidates_CD.copy()).to(self._device), self._options
        if len(candidates) > options.n_components:
            ww_CC = self._peers.sum_(self._own_examples().coefficient_products(candidates, l1=options.l1))
            kept_C = most_useful(candidates, ww_CC, options.n_components, options.n_frozen).double()
            # as worker 0 says: where two are equally useful, rounding on unlike machines must not tell
            candidates = candidates[self._peers.sum_(kept_C if self._peers.rank == 0 else 0 * kept_C) > 0]
        self._state = initial_state(candidates, options)

    def resume(self, checkpoint: Checkpoint) -> str | None:
        """Go on from a checkpoint, whatever number of workers wrote it; says if there is no step left to do."""
        self._state = SolverState.from_arrays(checkpoint.arrays).to(self._device)
        stored = [torch.from_numpy(checkpoint.read(coefficients_name(shard.shard))) for shard in self._fit]
        if stored:
            fit = self._own_examples()
            fit.coefficients_NK = torch.cat(stored).to(fit.coefficients_NK)
        return stopping_reason(self._state, self._options)

    def step(self) -> Step:
        """One pass and one step."""
        state, sent_before = self._current_state(), self._peers.sent_bytes
        statistics = self._reduced(self._own_examples().accumulate(state.components_KD, l1=self._options.l1))
        candidates = self._candidates(state) if bool(free_dead(statistics, self._options).any()) else None
        self._state, record = advance(state, statistics, self._options, candidates)
        return Step(record, stopping_reason(self._state, self._options), self._peers.sent_bytes - sent_before)

    def save(self, folder: Path) -> dict[str, np.ndarray]:
        """Write this worker's coefficients, one file per shard, into a checkpoint's folder; returns the state."""
        for shard, coefficients_NK in _by_shard(self._fit, self._own_examples()):
            write_checkpoint_array(folder, coefficients_name(shard.shard), coefficients_NK.cpu().numpy())
        return self._current_state().to_arrays()

    def finish(self) -> SolverResult:
        """The best accepted components in canonical order, and coefficients that are optimal for them."""
        best_KD, l1 = self._current_state().best_components_KD, self._options.l1
        fit = self._reduced(self._own_examples().finish(best_KD, l1=l1))
        # They are needed once: it does not pay to keep them in memory.
        held_out_examples, other_examples = (
            self._example_shard(chosen, memory_limit_bytes=0) for chosen in (self._held_out, self._others)
        )
        held_out = self._reduced(held_out_examples.finish(best_KD, l1=l1))
        other_examples.finish(best_KD, l1=l1)
        order_K, signs_K = canonical_order(best_KD, fit.energy_K, self._options.n_frozen)
        loss = fit.loss(best_KD)
        return SolverResult(
            components_KD=(best_KD[order_K] * signs_K[:, None]).cpu().numpy(),
            coefficients=self._all_coefficients(held_out_examples, other_examples, order_K),
            loss=loss,
            objective=loss + fit.penalties(best_KD, l1, self._options.orthogonality),
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

    def _own_examples(self) -> ExampleShard:
        assert self._examples is not None, "load comes first"
        return self._examples

    def _example_shard(self, chosen: list[ShardRows], memory_limit_bytes: int) -> ExampleShard:
        factors = stored_factors(self._store, chosen, self._device, memory_limit_bytes)
        none: NDArray[np.int64] = np.empty(0, np.int64)
        rows = np.concatenate([none, *(self._store.plan.bounds(part.shard)[0] + part.rows for part in chosen)])
        return ExampleShard(factors, weights_N=self._weights_N[rows])

    def _all_coefficients(
        self, held_out: ExampleShard, others: ExampleShard, order_K: Tensor
    ) -> dict[int, NDArray[np.float32]]:
        """Coefficients of every stored shard's examples, in their places; invalid ones are NaN."""
        found: dict[int, NDArray[np.float32]] = {}
        parts = ((self._fit, self._own_examples()), (self._held_out, held_out), (self._others, others))
        for part, examples in parts:
            for chosen, coefficients_NK in _by_shard(part, examples):
                start, stop = self._store.plan.bounds(chosen.shard)
                rows_NK = found.setdefault(
                    chosen.shard, np.full((stop - start, len(order_K)), np.nan, dtype=np.float32)
                )
                rows_NK[chosen.rows] = coefficients_NK[:, order_K].float().cpu().numpy()
        return found

    def _reduced(self, own: Statistics) -> Statistics:
        """The sum over all workers."""
        if self._peers.size == 1:
            return own
        return Statistics.unpack(self._peers.sum_(own.pack()), *own.u_KD.shape)

    def _candidates(self, state: SolverState) -> Candidates:
        """Replacements for dead components, from the worst-fitted examples of all workers."""
        gathered = self._peers.gathered(self._own_examples().candidates(state.components_KD).pack())
        return merge_candidates([Candidates.unpack(candidates) for candidates in gathered])


def coefficients_name(shard: int) -> str:
    """Of a stored shard's array in a checkpoint."""
    return f"coefficients/{shard:05d}"


def _by_shard(chosen: list[ShardRows], examples: ExampleShard) -> Iterator[tuple[ShardRows, Tensor]]:
    """Coefficients of the examples chosen from each shard."""
    parts = examples.coefficients_NK.split([len(shard.rows) for shard in chosen])
    return zip(chosen, parts, strict=True)
