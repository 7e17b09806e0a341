"""The executor that a run asks for. Ray is imported only where it is chosen."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch

from npeff.execution.executor import Executor
from npeff.execution.ray.jobs import in_job
from npeff.execution.serial import SerialExecutor


def make_executor(
    kind: str,
    *,
    address: str,
    workers: int,
    cpus_per_worker: int | Literal["auto"],
    gpus_per_worker: float,
    timeout_s: float,
) -> AbstractContextManager[Executor]:
    """The executor of this kind, closed when the context is left.

    Args:
        kind: ``ray``, ``serial``, or ``auto``, which is ``ray`` where it is needed: for several workers, for GPUs, for
            an address other than ``local``, and inside a Ray job.
        cpus_per_worker: threads of a worker. With ``auto``: `available_cores` where ``kind: auto`` needs no Ray; else
            one.
    """
    needs_ray = workers > 1 or gpus_per_worker > 0 or address != "local" or in_job()
    if kind == "serial" or (kind == "auto" and not needs_ray):
        threads = available_cores() if kind == "auto" else 1
        return contextlib.closing(SerialExecutor(threads if cpus_per_worker == "auto" else cpus_per_worker))
    from npeff.execution.ray.executor import RayExecutor

    return contextlib.closing(
        RayExecutor(
            address,
            workers=workers,
            cpus_per_worker=1 if cpus_per_worker == "auto" else cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            timeout_s=timeout_s,
        )
    )


def available_cores() -> int:
    """Cores for this process: torch's number of threads, at most the limit of the control group.

    torch starts with ``OMP_NUM_THREADS`` where it is set, and with the physical cores of the affinity mask otherwise.
    """
    from dask.system import cpu_count  # of the affinity mask and the control group

    return min(torch.get_num_threads(), cpu_count())
