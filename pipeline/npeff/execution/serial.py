"""Workers in this process, one at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from npeff.execution.executor import Failures, Group, WorkerSpec, is_item_error, reason_of


@contextmanager
def computing_threads(count: int) -> Iterator[None]:
    """Set torch's number of threads in this context. The last bits of a matrix product depend on this number."""
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
        self._kept: tuple[str, Any] | None = None
        """The worker of the last call of `map`, and its key."""

    def map(
        self,
        spec: WorkerSpec,
        method: str,
        items: Iterable[Any],
        *,
        keep_going: bool = False,
        split: Callable[[Any], Sequence[Any]] | None = None,
    ) -> Iterator[tuple[Any, Any]]:
        worker = self._kept[1] if self._kept is not None and self._kept[0] == spec.key else None
        failures, waiting = Failures(method, split, self.workers), deque((item, 1) for item in items)
        while waiting:
            item, attempt = waiting.popleft()
            with computing_threads(self._threads):
                if worker is None:
                    self._kept = None  # the memory may not hold two workers
                    worker = spec.construct()
                    self._kept = spec.key, worker
                try:
                    result = getattr(worker, method)(item)
                except Exception as error:
                    if not keep_going or not is_item_error(error):
                        raise
                    worker = self._kept = None
                    reason = reason_of(error)
                    waiting.extend((part, attempt + 1) for part in failures.failed(item, attempt, reason))
                    continue
            failures.succeeded()
            yield item, result
        failures.raise_any()

    @contextmanager
    def group(self, spec: WorkerSpec) -> Iterator[Group]:
        self._kept = None
        with computing_threads(self._threads):
            yield _SerialGroup(spec.construct(rank=0, size=1))

    def close(self) -> None:
        self._kept = None


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
