"""Where workers run. An `Executor` gives two things, and nothing else of the program knows how:

`Executor.map` hands independent items to workers and survives the loss of any of them;
`Executor.group` starts workers that act together, and says so when one of them is lost.

A worker is a plain class: constructed where it runs, from keyword arguments that can be sent there, then asked for
methods. `SerialExecutor` runs it in this process; `npeff.execution.ray.executor.RayExecutor` as Ray actors.
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
"""How often an item is given to a worker before it is given up."""

_IN_A_ROW = 4
"""Items' worth of attempts, or workers' worth where there are more, that may fail one after the other: then it is not
the items' own fault, and the others would fail as well."""

_OUT_OF_MEMORY = re.compile("can't allocate memory|out of memory", re.IGNORECASE)
"""In the text of torch's plain RuntimeError where memory of the CPU runs out: torch tells of it in no other way. An
error of this package is none, whatever its text says."""


class ExecutorError(NpeffError):
    """The work cannot go on where it was asked to run; the message says what to do."""


@dataclass(frozen=True)
class FailedItem:
    item: Any
    reason: str
    """Of its last attempt, one line."""


class ItemsFailedError(ExecutorError):
    """Some items failed at every attempt; the others are finished."""

    def __init__(self, method: str, failed: Sequence[FailedItem]) -> None:
        self.failed = tuple(failed)
        more = f" (and so did {len(failed) - 1} more)" if len(failed) > 1 else ""
        super().__init__(
            f"{method} {failed[0].item} was given up after {ATTEMPTS} attempts{more}; the last: {failed[0].reason}; "
            "all else is finished and kept: mend this and run the same command again, which tries only what failed"
        )


class Failures:
    """What becomes of items that fail in a `map` that keeps going.

    Args:
        split: parts of an item that fail or succeed by themselves; what is to be tried again of it.
        workers: how many may be lost at a time.
    """

    def __init__(self, method: str, split: Callable[[Any], Sequence[Any]] | None, workers: int) -> None:
        self._method, self._split = method, split
        self._most_in_a_row, self._in_a_row = ATTEMPTS * max(_IN_A_ROW, workers), 0
        self._given_up: list[FailedItem] = []

    def succeeded(self) -> None:
        self._in_a_row = 0

    def failed(self, item: Any, attempt: int, reason: str) -> Sequence[Any]:
        """What of the item is to be tried again.

        Raises:
            ExecutorError: so many attempts failed one after the other that the others would, too.
        """
        self._in_a_row += 1
        if self._in_a_row == self._most_in_a_row:
            raise ExecutorError(
                f"{self._method}: {self._in_a_row} attempts in a row failed (the last, {item}: {reason}); what is "
                "finished is kept: mend the cause and run the same command again"
            )
        if attempt == ATTEMPTS:
            self._given_up.append(FailedItem(item, reason))
            return ()
        return (item,) if self._split is None else self._split(item)

    def raise_any(self) -> None:
        """Raises ItemsFailedError where an item was given up."""
        if self._given_up:
            raise ItemsFailedError(self._method, self._given_up)


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):  # torch.OutOfMemoryError is one, and is said in the same words
        return _OUT_OF_MEMORY.search(str(error)) is not None or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, MemoryError)


def may_be_the_items_fault(error: BaseException) -> bool:
    """Whether other items may do better: the user's own code failed on it, or it is too large."""
    return isinstance(error, ItemError) or out_of_memory(error)


def reason_of(error: BaseException) -> str:
    """One line."""
    said = first_line(error)
    return f"out of memory ({said})" if out_of_memory(error) else said


class WorkerLostError(Exception):
    """A worker of a group died, hung or became unreachable; the whole group is unusable."""


@dataclass(frozen=True)
class WorkerSpec:
    """A worker to be constructed where it runs: ``worker_class(**arguments)``."""

    worker_class: type
    arguments: dict[str, Any] = field(default_factory=dict)
    lease: Path | None = None
    """A file that the worker's own process, where it has one, holds a shared lock on for as long as it lives."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of this worker: mapped again, with no other in between, it is not constructed anew."""

    def construct(self, **more: Any) -> Any:
        return self.worker_class(**self.arguments, **more)


class Group(Protocol):
    """Workers that act together; worker ``rank`` of ``size``."""

    size: int

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """``method(*arguments)`` on every worker at once; results by rank.

        Raises:
            WorkerLostError: a worker is gone. Exceptions of ``method`` itself come through as they are.
        """
        ...

    def call_one(self, rank: int, method: str, *arguments: Any) -> Any:
        """``method(*arguments)`` on one worker."""
        ...

    def can_be_larger(self) -> bool:
        """Whether a group formed now would have more workers: one of them was lost, and there is room for it again."""
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
        """``(item, method(item))`` for every item, in the order in which they are finished.

        An item whose worker is lost is given to another one, three times at most. Called again with the same spec, it
        finds its workers as they were, unless others have come in between.

        Args:
            keep_going: an item that the user's code fails on, or that memory does not suffice for, is given to a fresh
                worker likewise, after the others; and one that is given up does not keep the others from being
                finished first. An error of the worker's constructor is never an item's.
            split: parts of an item, to be tried one by one once it has failed.

        Raises:
            ItemsFailedError: items were given up, at the end, where it keeps going.
            ExecutorError: an item was given up, or no worker can be started.
        """
        ...

    def group(self, spec: WorkerSpec) -> AbstractContextManager[Group]:
        """As many workers as the executor has, ended when the context is left; fewer where nodes were lost.

        They are constructed with two further arguments, ``rank`` and ``size``.

        Raises:
            ExecutorError: there is no room for a single worker, and none comes.
        """
        ...

    def close(self) -> None: ...
