"""Collective operations of workers: torch.distributed with a separate store and a timeout for every wait."""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from npeff.errors import first_line
from npeff.execution.executor import WorkerLostError


@contextmanager
def lost_workers(what_failed: str) -> Iterator[None]:
    """Convert the errors of torch.distributed, all of which are RuntimeError, to `WorkerLostError`."""
    try:
        yield
    except RuntimeError as error:
        raise WorkerLostError(f"{what_failed} ({first_line(error)})") from None


class ProcessGroup:
    """The process group of worker ``rank`` of ``size``. A single worker needs no connection."""

    def __init__(self, device: torch.device, timeout_s: float, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._device, self._timeout = device, datetime.timedelta(seconds=timeout_s)
        self._rendezvous: TCPStore | None = None
        self.sent_bytes = 0
        """Total size in bytes of the tensors that this worker passed to collective operations."""

    def open_rendezvous(self) -> tuple[str, int]:
        """On worker 0, listen for the other workers on this node's address only. Returns host and port."""
        from npeff.execution.ray.placement import node_address

        host = node_address()
        listener = socket.create_server((host, 0))
        port = listener.getsockname()[1]
        self._rendezvous = TCPStore(
            host,
            port,
            self.size,
            is_master=True,
            timeout=self._timeout,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return host, port

    def connect(self, host: str, port: int) -> None:
        """Form the process group. If a peer is lost later, operations raise at the latest after the timeout.

        Raises:
            WorkerLostError: not all workers connected.
        """
        if host == "127.0.0.1":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        with lost_workers("the workers could not connect"):
            store = self._rendezvous or TCPStore(host, port, self.size, is_master=False, timeout=self._timeout)
            backend = "nccl" if self._device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=self._timeout)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all workers, in place.

        Raises:
            WorkerLostError: a worker is lost.
        """
        if self.size > 1:
            self.sent_bytes += tensor.nbytes
            with lost_workers("the all-reduce failed"):
                dist.all_reduce(tensor)
        return tensor

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all workers by rank. All tensors must have the same shape.

        Raises:
            WorkerLostError: a worker is lost.
        """
        if self.size == 1:
            return [tensor]
        self.sent_bytes += tensor.nbytes
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with lost_workers("the all-gather failed"):
            dist.all_gather(found, tensor)
        return found

    def union(self, values: Tensor) -> Tensor:
        """Return the distinct numbers of all workers, ascending. Each worker passes a 1-D tensor of any length."""
        lengths = self.gathered(torch.tensor([len(values)], device=self._device))
        padded = values.new_zeros(max(int(length) for length in lengths)).to(self._device)
        padded[: len(values)] = values
        parts = [part[: int(length)] for part, length in zip(self.gathered(padded), lengths, strict=True)]
        result: Tensor = torch.cat(parts).unique()
        return result


class ProcessGroupMember:
    """A worker with a process group that the driver connects."""

    def __init__(self, peers: ProcessGroup) -> None:
        self._peers = peers

    def open_rendezvous(self) -> tuple[str, int]:
        """On worker 0, listen for the other workers on this node's address only. Returns host and port."""
        return self._peers.open_rendezvous()

    def connect(self, host: str, port: int) -> None:
        """Form the process group.

        Raises:
            WorkerLostError: not all workers connected.
        """
        self._peers.connect(host, port)
