"""The executor that a run asks for. Ray is imported only where it is chosen."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

from npeff.execution.executor import Executor
from npeff.execution.serial import SerialExecutor


def make_executor(
    kind: str, *, address: str, workers: int, cpus_per_worker: int, gpus_per_worker: float, timeout_s: float
) -> AbstractContextManager[Executor]:
    """The executor of this kind, closed when the context is left. Imports Ray only where it is chosen."""
    if kind == "serial":
        return contextlib.closing(SerialExecutor(cpus_per_worker))
    from npeff.execution.ray.executor import RayExecutor

    return contextlib.closing(
        RayExecutor(
            address,
            workers=workers,
            cpus_per_worker=cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            timeout_s=timeout_s,
        )
    )
