"""Creation of the executor of a run. Ray is imported only if the executor uses it."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch

from npeff.execution.executor import Executor, ExecutorError
from npeff.execution.ray.jobs import in_job
from npeff.execution.serial import SerialExecutor


def make_executor(
    kind: str,
    *,
    address: str,
    workers: int,
    cpus_per_worker: int | Literal["auto"],
    gpus_per_worker: float,
    devices_per_model: int = 1,
    timeout_s: float,
) -> AbstractContextManager[Executor]:
    """Create an executor, as a context manager that closes it on exit.

    Args:
        kind: ``ray``, ``serial`` or ``auto``. ``auto`` is ``ray`` if Ray is needed: for several workers or devices per
            model, for GPUs, for an address other than ``local``, and in a Ray job. Otherwise, it is ``serial``.
        address: Address of the Ray cluster; ``local`` starts a private Ray instance.
        workers: Number of workers.
        cpus_per_worker: Number of CPU cores, and of threads, of a worker. ``auto`` is `available_cores` if ``kind`` is
            ``auto`` and Ray is not needed. Otherwise, it is one.
        gpus_per_worker: Number of GPUs of a worker, possibly a fraction.
        devices_per_model: Number of processes of a worker, each with these cores and GPUs and a part of the model.
        timeout_s: Timeout in seconds for each call of a Ray actor.

    Returns:
        A context manager that returns the executor.

    Raises:
        ExecutorError: An address is given for the kind ``serial``, Ray cannot be reached, or the cluster does not have
            the resources.
    """
    needs_ray = workers > 1 or devices_per_model > 1 or gpus_per_worker > 0 or address != "local" or in_job()
    if kind == "serial" and address != "local" and not in_job():
        raise ExecutorError(
            f"executor.kind: serial runs in this process, and not at the address {address!r}",
            "remove the address, or set executor.kind: auto",
        )
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
            devices_per_model=devices_per_model,
            timeout_s=timeout_s,
        )
    )


def available_cores() -> int:
    """Return the number of cores for this process: torch's number of threads, at most the limit of the control group.

    torch's initial number of threads is ``OMP_NUM_THREADS`` if it is set. Otherwise, it is the number of physical cores
    in the affinity mask.
    """
    from dask.system import cpu_count  # of the affinity mask and the control group

    return min(torch.get_num_threads(), int(cpu_count()))
