"""The driver of the stage `factorize`: run a group of solver workers to the end, with checkpoints and recovery."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from npeff.execution.executor import Executor, ExecutorError, Group, WorkerLostError, WorkerSpec
from npeff.stages.factorize.worker import SolverResult, Step
from npeff.store.checkpoint import CheckpointStore
from npeff.store.schemas import SCHEMAS
from npeff.store.shard_records import ShardChecksums

LOSSES = 3
"""Number of consecutive groups that are lost without a new checkpoint after which the stage fails."""

_BACK_OFF_S = 5.0
"""Wait before the next group after a group was lost without progress. A cluster detects a lost node with a delay."""

_HISTORY = SCHEMAS["history"]
_TYPES = {pa.int64(): int, pa.bool_(): bool}


@dataclass(frozen=True)
class SolverRun:
    """The result of the solver: one history row per iteration, and the reason to stop."""

    result: SolverResult
    workers: int
    """Number of workers that wrote their coefficients."""
    history: list[dict[str, Any]]
    stopped: str


def run_solver(
    executor: Executor,
    spec: WorkerSpec,
    checkpoints: CheckpointStore,
    checksums: dict[int, ShardChecksums],
    folder: Path,
    *,
    checkpoint_every: int,
    on_iteration: Callable[[dict[str, Any]], None],
    on_event: Callable[[str], None],
) -> SolverRun:
    """Run the solver. When a worker is lost, start a new group and resume from the last checkpoint.

    After the loss of a node, the new group can be smaller. It is replaced by a larger group, at a checkpoint, when
    resources become available.

    Args:
        executor: executor of the workers.
        spec: spec of the `SolverWorker`.
        checkpoints: store of the checkpoints.
        checksums: checksum of every stored shard, by number.
        folder: the workers write the coefficients to it, see `SolverWorker.finish`.
        checkpoint_every: number of iterations between checkpoints.
        on_iteration: called with each new row of the history.
        on_event: called with a line of text when a group is lost or the solver resumes.

    Raises:
        ExecutorError: `LOSSES` groups in a row were lost without progress, or the workers disagree about a step.
    """
    losses, reached = 0, -1
    while True:
        try:
            with executor.group(spec) as group:
                done = _run_group(group, checkpoints, checksums, checkpoint_every, on_iteration, on_event)
                if done is not None:
                    results: list[SolverResult] = group.call("finish", folder)
                    return SolverRun(results[0], len(results), *done)
            on_event("more workers are available: restarting from the checkpoint")
        except WorkerLostError as error:
            checkpoint = checkpoints.latest()
            now = checkpoint.iteration if checkpoint else 0
            losses, reached = (losses + 1 if now <= reached else 1), max(now, reached)
            if losses == LOSSES:
                raise ExecutorError(
                    f"the solver's workers were lost {LOSSES} times in a row (the last: {error}); finished work is "
                    "kept: fix the cause and run the same command again to resume"
                ) from None
            on_event(f"{error}: restarting the workers from iteration {now}")
            time.sleep(_BACK_OFF_S * (losses - 1))


def _run_group(
    group: Group,
    checkpoints: CheckpointStore,
    checksums: dict[int, ShardChecksums],
    checkpoint_every: int,
    on_iteration: Callable[[dict[str, Any]], None],
    on_event: Callable[[str], None],
) -> tuple[list[dict[str, Any]], str] | None:
    """Run the steps of the solver with one group.

    Returns:
        The history and the reason to stop, or None if a larger group can continue from a new checkpoint.
    """
    if group.size > 1:
        group.call("connect", *group.call_one(0, "open_rendezvous"))
    group.call("load", checksums)
    checkpoint = checkpoints.latest()
    history: list[dict[str, Any]] = []
    stopped: str | None = None
    if checkpoint is None:
        group.call("start", group.call_one(0, "initialize"))
    else:
        for warning in checkpoint.warnings:
            on_event(warning)
        stopped = group.call("resume", checkpoint)[0]
        history = _history_rows(checkpoint.arrays["history"])
        on_event(f"resuming from iteration {checkpoint.iteration}")
    while stopped is None:
        began = time.monotonic()
        steps: list[Step] = group.call("step")
        step = steps[0]
        if any(other.record.accepted != step.record.accepted for other in steps):
            # the components would differ between the workers, and their sums would be wrong
            raise ExecutorError(
                f"the solver's workers disagree on whether step {step.record.iteration} lowers the loss, because their "
                "processors round differently; finished work is kept: run the same command again on nodes of one "
                "type, or with executor.workers: 1"
            )
        history.append(_history_row(step, time.monotonic() - began))
        on_iteration(history[-1])
        stopped, iteration = step.stopped, step.record.iteration
        if stopped is not None or iteration % checkpoint_every == 0:
            folder = checkpoints.begin(iteration)
            state = group.call("save", folder)[0]
            checkpoints.commit(iteration, {**state, "history": _history_array(history)})
            if stopped is None and group.can_be_larger():
                return None
    return history, stopped


def _history_row(step: Step, seconds: float) -> dict[str, Any]:
    return {**asdict(step.record), "seconds": seconds, "sent_bytes": step.sent_bytes}


def _history_array(history: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[float(row[name]) for name in _HISTORY.names] for row in history], dtype=np.float64)


def _history_rows(array: np.ndarray) -> list[dict[str, Any]]:
    return [
        {field.name: _TYPES.get(field.type, float)(value) for field, value in zip(_HISTORY, row, strict=True)}
        for row in array.tolist()
    ]
