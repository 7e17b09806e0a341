"""An executor whose workers are forks of this process, so that what workers agree on can be tested without Ray."""

from __future__ import annotations

import multiprocessing
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch
from npeff.execution.executor import Group, WorkerLostError, WorkerSpec

_FORK = multiprocessing.get_context("fork")


class ForkedExecutor:
    def __init__(self, workers: int) -> None:
        self.workers = workers

    @contextmanager
    def group(self, spec: WorkerSpec) -> Iterator[Group]:
        self.latest = ForkedGroup([spec] * self.workers)
        try:
            yield self.latest
        finally:
            self.latest.end()


class ForkedGroup:
    def __init__(self, specs: list[WorkerSpec]) -> None:
        self.size = len(specs)
        self._pipes, self.processes = [], []
        for rank, spec in enumerate(specs):
            here, there = _FORK.Pipe()
            process = _FORK.Process(target=_serve, args=(spec, rank, self.size, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((method, arguments))
        return [self._result(pipe) for pipe in self._pipes]

    def call_one(self, rank: int, method: str, *arguments: Any) -> Any:
        self._pipes[rank].send((method, arguments))
        return self._result(self._pipes[rank])

    def can_be_larger(self) -> bool:
        return False

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def _result(self, pipe: Connection) -> Any:
        try:
            result = pipe.recv()
        except EOFError:
            raise WorkerLostError("a worker was lost") from None
        if isinstance(result, BaseException):
            raise result
        return result


def _serve(spec: WorkerSpec, rank: int, size: int, pipe: Connection) -> None:
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork, and a product would wait for them forever
    # the address of this machine, for which the solver's worker asks Ray
    sys.modules["npeff.execution.ray.placement"] = types.SimpleNamespace(node_address=lambda: "127.0.0.1")  # type: ignore[assignment]
    worker: Any = None
    while True:
        method, arguments = pipe.recv()
        try:
            worker = worker or spec.construct(rank=rank, size=size)
            pipe.send(getattr(worker, method)(*arguments))
        except Exception as error:
            pipe.send(error)
