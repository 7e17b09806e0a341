"""The interface of executors, which distribute work over workers. An `Executor` has two methods:

`Executor.map` distributes independent items over workers and recovers from the loss of any worker;
`Executor.group` starts workers that communicate with each other and raises `WorkerLostError` if one of them is lost.

A worker is an instance of a plain class. It is constructed in the process where it runs, from keyword arguments that
can be serialized, and its methods are then called there. `SerialExecutor` runs workers in this process;
`npeff.execution.ray.executor.RayExecutor` runs them as Ray actors.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from npeff.errors import ItemError, NpeffError, first_line

ATTEMPTS = 3
"""Number of attempts to compute an item before the item is reported as failed."""

_IN_A_ROW = 4
"""`Failures` stops after ``ATTEMPTS * max(_IN_A_ROW, workers)`` consecutive failed attempts. The cause is then probably
not the items themselves, and the remaining items would fail as well."""

_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)
"""Text of the plain RuntimeError that torch raises when CPU memory runs out; torch has no exception class for this.
Errors of this package are never out-of-memory errors, whatever their text."""


class ExecutorError(NpeffError):
    """The executor cannot continue. The message states the cause and the remedy."""


@dataclass(frozen=True)
class FailedItem:
    item: Any
    reason: str
    """Cause of the failure of the last attempt, one line."""


class ItemsFailedError(ExecutorError):
    """Some items failed at every attempt. All other items are finished."""

    def __init__(self, method: str, failed: Sequence[FailedItem]) -> None:
        self.failed = tuple(failed)
        more = f", and so did {len(failed) - 1} more" if len(failed) > 1 else ""
        super().__init__(
            f"{method} {failed[0].item} failed after {ATTEMPTS} attempts{more} (last error: {failed[0].reason}); all "
            "other items are finished: fix the cause and run the same command again, which computes only the failed "
            "items"
        )


class Failures:
    """The failed items of a `map` with ``keep_going=True``.

    Args:
        method: the worker's method, for error messages.
        split: returns the parts of a failed item to retry. Each part fails or succeeds independently.
        workers: number of workers of the executor, which may all fail at the same time.
    """

    def __init__(self, method: str, split: Callable[[Any], Sequence[Any]] | None, workers: int) -> None:
        self._method, self._split = method, split
        self._most_in_a_row, self._in_a_row = ATTEMPTS * max(_IN_A_ROW, workers), 0
        self._given_up: list[FailedItem] = []

    def succeeded(self) -> None:
        self._in_a_row = 0

    def failed(self, item: Any, attempt: int, reason: str) -> Sequence[Any]:
        """Record a failed attempt and return the items to retry: the item or its parts; none after the last attempt.

        Raises:
            ExecutorError: too many consecutive attempts failed, so the remaining items would probably fail as well.
        """
        self._in_a_row += 1
        if self._in_a_row == self._most_in_a_row:
            raise ExecutorError(
                f"{self._method}: {self._in_a_row} attempts in a row failed (last error, for {item}: {reason}); "
                "finished work is kept: fix the cause and run the same command again to resume"
            )
        if attempt == ATTEMPTS:
            self._given_up.append(FailedItem(item, reason))
            return ()
        return (item,) if self._split is None else self._split(item)

    def raise_any(self) -> None:
        """Raise ItemsFailedError if an item failed at every attempt."""
        if self._given_up:
            raise ItemsFailedError(self._method, self._given_up)


def out_of_memory(error: BaseException) -> bool:
    """Return whether the error reports that the memory of the CPU or the GPU ran out."""
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is a RuntimeError
        return _OUT_OF_MEMORY.search(str(error)) is not None or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError)


def is_item_error(error: BaseException) -> bool:
    """Return whether the error may be specific to one item: the user's code failed on it, or memory ran out."""
    return isinstance(error, ItemError) or out_of_memory(error)


def reason_of(error: BaseException) -> str:
    """Return the cause of an error as one line."""
    line = first_line(error)
    return f"out of memory ({line})" if out_of_memory(error) else line


class WorkerLostError(Exception):
    """A worker of a group died, hung or became unreachable. The whole group is unusable."""


@dataclass(frozen=True)
class WorkerSpec:
    """The class and constructor arguments of a worker: ``worker_class(**arguments)``."""

    worker_class: type
    arguments: dict[str, Any] = field(default_factory=dict)
    lease: Path | None = None
    """A file on which the worker's process, if it is not the driver's, holds a shared lock for its lifetime."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Identity of this worker. Consecutive `map` calls with the same key reuse the constructed workers."""
    helper: WorkerSpec | None = None
    """What the other processes of a worker construct, if it has several (`npeff.execution.team`). They only serve the
    first process, which runs the worker. If None, all processes run the worker and call the same method."""

    def construct(self, **more: Any) -> Any:
        return self.worker_class(**self.arguments, **more)


class Group(Protocol):
    """Workers that communicate with each other. A worker's rank is in 0, …, ``size`` − 1."""

    size: int

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call ``method(*arguments)`` on all workers in parallel and return the results by rank.

        Raises:
            WorkerLostError: a worker is lost. Exceptions raised by ``method`` are raised unchanged.
        """
        ...

    def call_one(self, rank: int, method: str, *arguments: Any) -> Any:
        """Call ``method(*arguments)`` on one worker and return the result."""
        ...

    def can_be_larger(self) -> bool:
        """Return whether a new group would have more workers, because the resources of a lost worker are available."""
        ...


class Executor(Protocol):
    workers: int

    def map(
        self,
        spec: WorkerSpec,
        method: str,
        items: Iterable[Any],
        *,
        keep_going: bool = False,
        split: Callable[[Any], Sequence[Any]] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        """Yield ``(item, method(item))`` for every item, in the order in which the items are finished.

        If a worker is lost, its item is retried on another worker, with three attempts at most. A further call with the
        same spec reuses the constructed workers, unless a call with another spec came in between.

        Args:
            spec: the workers.
            method: name of the worker's method.
            items: arguments of the calls.
            keep_going: also retry an item on a new worker, after the other items, if the user's code fails on the item
                or memory runs out. Items that fail at every attempt are reported after all others are finished. An
                error of the worker's constructor is never retried.
            split: returns the parts of a failed item, which are then retried one by one.

        Raises:
            ItemsFailedError: with ``keep_going``, after all other items: some items failed at every attempt.
            ExecutorError: an item failed at every attempt, or no worker can be started.
        """
        ...

    def group(self, spec: WorkerSpec) -> AbstractContextManager[Group]:
        """Start as many workers as the executor has, or fewer if nodes were lost. They end when the context exits.

        Workers are constructed with two further arguments, ``rank`` and ``size``.

        Raises:
            ExecutorError: the resources for a single worker are not available within the timeout.
        """
        ...

    def close(self) -> None: ...


def result_of(executor: Executor, spec: WorkerSpec, method: str, item: Any) -> Any:
    """Return ``method(item)`` of one worker. Raises as `Executor.map`."""
    return next(iter(executor.map(spec, method, [item])))[1]
