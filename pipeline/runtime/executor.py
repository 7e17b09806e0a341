"""Where workers run. An `Executor` gives two things, and nothing else of the program knows how:

`Executor.map` hands independent items to workers and survives the loss of any of them;
`Executor.group` starts workers that act together, and says so when one of them is lost.

A worker is a plain class: constructed where it runs, from keyword arguments that can be sent there, then asked for
methods. `SerialExecutor` runs it in this process; `pipeline.runtime.ray_executor.RayExecutor` as Ray actors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch


class ExecutorError(Exception):
    """The work cannot go on where it was asked to run; the message says what to do."""


class WorkerLostError(Exception):
    """A worker of a group died, hung or became unreachable; the whole group is unusable."""


@dataclass(frozen=True)
class WorkerSpec:
    """A worker to be constructed where it runs: ``worker_class(**arguments)``."""

    worker_class: type
    arguments: dict[str, Any] = field(default_factory=dict)
    lease: Path | None = None
    """A file that the worker's own process, where it has one, holds a shared lock on for as long as it lives."""

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

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """``(item, method(item))`` for every item, in the order in which they are finished.

        An item whose worker is lost is given to another one, three times at most.

        Raises:
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


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """Set torch's threads: the last bits of a matrix product depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class SerialExecutor:
    """One worker, in this process."""

    workers = 1

    def __init__(self, cpus_per_worker: int = 1) -> None:
        self._threads = cpus_per_worker

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        worker: Any = None
        for item in items:
            with computing_threads(self._threads):
                worker = worker or spec.construct()
                result = getattr(worker, method)(item)
            yield item, result

    @contextmanager
    def group(self, spec: WorkerSpec) -> Iterator[Group]:
        with computing_threads(self._threads):
            yield _SerialGroup(spec.construct(rank=0, size=1))

    def close(self) -> None:
        """Nothing is held between calls."""


class _SerialGroup:
    size = 1

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return [self.call_one(0, method, *arguments)]

    def call_one(self, rank: int, method: str, *arguments: Any) -> Any:
        if rank != 0:
            raise IndexError(f"the serial executor has worker 0, not {rank}")
        return getattr(self._worker, method)(*arguments)

    def can_be_larger(self) -> bool:
        return False


def make_executor(
    kind: str, *, address: str, workers: int, cpus_per_worker: int, gpus_per_worker: float, timeout_s: float
) -> AbstractContextManager[Executor]:
    """The executor of this kind, closed when the context is left. Imports Ray only where it is chosen."""
    if kind == "serial":
        return contextlib.closing(SerialExecutor(cpus_per_worker))
    from pipeline.runtime.ray_executor import RayExecutor

    return contextlib.closing(
        RayExecutor(
            address,
            workers=workers,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            timeout_s=timeout_s,
        )
    )
