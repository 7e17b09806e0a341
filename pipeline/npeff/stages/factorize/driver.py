"""The driver's half of stage 2: run a group of solver workers to the end, through checkpoints and losses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from npeff.execution.executor import Executor, ExecutorError, Group, WorkerLostError, WorkerSpec
from npeff.stages.factorize.worker import SolverResult, Step
from npeff.store.checkpoint import CheckpointStore
from npeff.store.tables import SCHEMAS

LOSSES = 3
"""Groups that may be lost, one after the other, without a new checkpoint before the stage is given up."""

_BACK_OFF_S = 5.0
"""Wait before the next group where one was lost without progress: a cluster takes a while to see that a node died."""

_HISTORY = SCHEMAS["history"]
_TYPES = {pa.int64(): int, pa.bool_(): bool}


@dataclass(frozen=True)
class SolverRun:
    """What came of it: one result per worker, one history row per iteration, and why it stopped."""

    results: list[SolverResult]
    history: list[dict[str, Any]]
    stopped: str


def run_solver(
    executor: Executor,
    spec: WorkerSpec,
    checkpoints: CheckpointStore,
    checksums: dict[int, str],
    *,
    checkpoint_every: int,
    on_iteration: Callable[[dict[str, Any]], None],
    on_event: Callable[[str], None],
) -> SolverRun:
    """Factorize; whenever a worker is lost, form a new group and go on from the last checkpoint.

    A group formed when a node was lost may be a smaller one. It gives way to a larger one, at a checkpoint, as soon as
    there is room for it.

    Args:
        checksums: of every stored shard, by number.
        on_iteration: is given each new row of the history.
        on_event: is told, in a line, what was resumed or lost.

    Raises:
        ExecutorError: groups are lost again and again without progress, or the workers do not judge a step alike.
    """
    losses, reached = 0, -1
    while True:
        try:
            with executor.group(spec) as group:
                done = _run_group(group, checkpoints, checksums, checkpoint_every, on_iteration, on_event)
            if done is not None:
                return done
            on_event("there is room for more workers: starting them from the checkpoint")
        except WorkerLostError as error:
            checkpoint = checkpoints.latest()
            now = checkpoint.iteration if checkpoint else 0
            losses, reached = (losses + 1 if now <= reached else 1), max(now, reached)
            if losses == LOSSES:
                raise ExecutorError(
                    f"the solver's workers were lost {LOSSES} times in a row (the last: {error}); the checkpoints are "
                    "kept: mend the cause and run the same command again"
                ) from None
            on_event(f"{error}: starting the workers again from iteration {now}")
            time.sleep(_BACK_OFF_S * (losses - 1))


def _run_group(
    group: Group,
    checkpoints: CheckpointStore,
    checksums: dict[int, str],
    checkpoint_every: int,
    on_iteration: Callable[[dict[str, Any]], None],
    on_event: Callable[[str], None],
) -> SolverRun | None:
    """None if there is more to do, and a larger group could do it from the checkpoint."""
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
        on_event(f"going on from iteration {checkpoint.iteration}")
    while stopped is None:
        began = time.monotonic()
        steps: list[Step] = group.call("step")
        step = steps[0]
        if any(other.record.accepted != step.record.accepted for other in steps):
            # their components would differ from now on, and the sums over the workers would mean nothing
            raise ExecutorError(
                f"the solver's workers disagree on whether step {step.record.iteration} lowers the loss: their "
                "processors round differently; the checkpoints are kept: run the same command again on nodes of one "
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
    return SolverRun(group.call("finish"), history, stopped)


def _history_row(step: Step, seconds: float) -> dict[str, Any]:
    return {**asdict(step.record), "seconds": seconds, "sent_bytes": step.sent_bytes}


def _history_array(history: list[dict[str, Any]]) -> np.ndarray:
    return np.array([[float(row[name]) for name in _HISTORY.names] for row in history], dtype=np.float64)


def _history_rows(array: np.ndarray) -> list[dict[str, Any]]:
    return [
        {field.name: _TYPES.get(field.type, float)(value) for field, value in zip(_HISTORY, row, strict=True)}
        for row in array.tolist()
    ]
