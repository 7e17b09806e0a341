"""Workers that add up numbers: torch.distributed with a store of its own, and every wait with a timeout."""

from __future__ import annotations

import datetime
import os
import socket

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from npeff.errors import first_line
from npeff.execution.executor import WorkerLostError


class ProcessGroup:
    """Worker ``rank`` of ``size``; one alone needs no connection."""

    def __init__(self, device: torch.device, timeout_s: float, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._device, self._timeout = device, datetime.timedelta(seconds=timeout_s)
        self._rendezvous: TCPStore | None = None
        self.sent_bytes = 0
        """What this worker gave to the collective operations so far: the size of their tensors."""

    def open_rendezvous(self) -> tuple[str, int]:
        """On worker 0: listen, on this node's own address only, for the others."""
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
        """Form the process group; a peer that is lost later raises, at the latest after the timeout.

        Raises:
            WorkerLostError: not all workers came.
        """
        if host == "127.0.0.1":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        try:
            store = self._rendezvous or TCPStore(host, port, self.size, is_master=False, timeout=self._timeout)
            backend = "nccl" if self._device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=self._timeout)
        except RuntimeError as error:
            raise WorkerLostError(f"the workers could not connect ({first_line(error)})") from None

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all workers, in place.

        Raises:
            WorkerLostError: a worker is gone.
        """
        if self.size > 1:
            self.sent_bytes += tensor.nbytes
            try:
                dist.all_reduce(tensor)
            except RuntimeError as error:
                raise WorkerLostError(f"the all-reduce failed ({first_line(error)})") from None
        return tensor

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors, all of one shape, of all workers by rank.

        Raises:
            WorkerLostError: a worker is gone.
        """
        if self.size == 1:
            return [tensor]
        self.sent_bytes += tensor.nbytes
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            dist.all_gather(found, tensor)
        except RuntimeError as error:
            raise WorkerLostError(f"the all-gather failed ({first_line(error)})") from None
        return found

    def union(self, values: Tensor) -> Tensor:
        """All distinct numbers that some worker has, ascending; each worker gives a tensor of any length."""
        lengths = self.gathered(torch.tensor([len(values)], device=self._device))
        padded = values.new_zeros(max(int(length) for length in lengths)).to(self._device)
        padded[: len(values)] = values
        parts = [part[: int(length)] for part, length in zip(self.gathered(padded), lengths, strict=True)]
        result: Tensor = torch.cat(parts).unique()
        return result


class ProcessGroupMember:
    """A worker that a driver has join the others."""

    def __init__(self, peers: ProcessGroup) -> None:
        self._peers = peers

    def open_rendezvous(self) -> tuple[str, int]:
        """On worker 0: listen, on this node's own address only, for the others."""
        return self._peers.open_rendezvous()

    def connect(self, host: str, port: int) -> None:
        """Form the process group.

        Raises:
            WorkerLostError: not all workers came.
        """
        self._peers.connect(host, port)
