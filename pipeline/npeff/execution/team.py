"""A worker of several processes, which hold the parts of one model.

The processes of a team keep *shards*: flat tensors of equal size, one of each number in every process, whose
concatenation over the processes is the content of that number. A process that needs a content fetches it, and the
others send their shards. For this, all processes take part in *turns*. In a turn, each process states what it wants, or
that it wants nothing, and all of them do what is wanted. A process without work takes part in turns (`Team.serve`)
until no process has work. The processes can therefore do different amounts of work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist
from torch import Tensor

from npeff.execution.process_group import ProcessGroup, lost_workers

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the name until torch 2.12
_IDLE, _FETCH, _STORE, _LOAD = range(4)
_Wish = tuple[int, int]
"""What a process wants in a turn, and the number of the shards."""

_current: Team | None = None


class Team:
    """The processes of one worker, from the point of view of the process ``rank``.

    Args:
        group: The connected process group.

    Attributes:
        fetched_bytes: Total size in bytes of the contents that this process fetched.
        n_kept: Number of times that the shards were replaced.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.size = group.rank, group.size
        # the turns need no device, and waiting for one would cost more than the message
        self._control = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._shards: Sequence[Tensor] = ()
        self._load: Callable[[], None] | None = None
        self.fetched_bytes, self.n_kept = 0, 0

    def keep(self, shards: Sequence[Tensor]) -> None:
        """Replace the shards of this process: one-dimensional tensors of bytes (uint8)."""
        self._shards = shards
        self.n_kept += 1

    def when_loading(self, load: Callable[[], None]) -> None:
        """Set the function that this process calls while it serves, when the first process wants to load a model."""
        self._load = load

    def begin_loading(self) -> None:
        """Let all processes load a model. They then make the same collective calls until it is loaded."""
        self._turn((_LOAD, 0), None)

    def text(self, value: str) -> str:
        """Return the text of process 0. All processes call this method together."""
        content = value.encode()
        length = int(self._broadcast(torch.tensor([len(content)])))
        padded = content[:length].ljust(length)  # the text of another process may be shorter
        return self._broadcast(_from_bytes(padded)).numpy().tobytes().decode() if length else ""

    def fetch(self, number: int, content: Tensor) -> None:
        """Read a content (size × length of a shard, uint8)."""
        self.fetched_bytes += content.nbytes
        self._turn((_FETCH, number), content)

    def store(self, number: int, content: Tensor) -> None:
        """Replace a content in all processes. The other processes must serve."""
        self._turn((_STORE, number), content)

    def serve(self) -> None:
        """Do what other processes want until all processes serve."""
        while self._turn((_IDLE, 0), None):
            pass

    def scatter(self, content: Tensor | None, shard: Tensor) -> None:
        """Receive a shard of a content of process 0. All processes call this method together."""
        with _lost("scatter"):
            dist.scatter(shard, self._parts(content) if self.rank == 0 else None, src=0)

    def broadcast(self, values: Tensor) -> Tensor:
        """Return the tensor of process 0, of the same shape. All processes call this method together."""
        sent = values.contiguous().reshape(-1).view(torch.uint8)
        with _lost("broadcast"):
            dist.broadcast(sent, src=0)
        return sent.view(values.dtype).view(values.shape)

    def _broadcast(self, values: Tensor) -> Tensor:
        with _lost("broadcast"):
            dist.broadcast(values, src=0, group=self._control)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes. All processes call this method together."""
        total = values.cpu().clone()
        with _lost("all-reduce"):
            dist.all_reduce(total, group=self._control)
        return total

    def gather_bytes(self, content: bytes) -> list[bytes]:
        """Return the bytes of all processes by rank in process 0, and nothing in the others."""
        with _lost("gather"):
            length = torch.tensor([len(content)])
            lengths = [torch.zeros_like(length) for _ in range(self.size)]
            dist.all_gather(lengths, length, group=self._control)
            if self.rank > 0:
                if content:
                    dist.send(_from_bytes(content), 0, group=self._control)
                return []
            found = [content]
            for rank in range(1, self.size):
                received = torch.empty(int(lengths[rank]), dtype=torch.uint8)
                if len(received):
                    dist.recv(received, rank, group=self._control)
                found.append(received.numpy().tobytes())
            return found

    def _turn(self, wish: _Wish, content: Tensor | None) -> bool:
        """Take part in a turn. Return whether any process wanted something."""
        with _lost("turn"):
            mine = torch.tensor(wish)
            wishes = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(wishes, mine, group=self._control)
            wanted: dict[_Wish, list[int]] = {}
            for rank, (kind, number) in enumerate(each.tolist() for each in wishes):
                if kind != _IDLE:
                    wanted.setdefault((kind, number), []).append(rank)
            for (kind, number), ranks in sorted(wanted.items()):
                own = content if self.rank in ranks else None
                if kind == _FETCH:
                    self._send(number, ranks, own)
                elif kind == _STORE:
                    dist.scatter(self._shards[number], self._parts(own), src=ranks[0])
        if any(kind == _LOAD and self.rank not in ranks for (kind, _), ranks in wanted.items()):
            assert self._load is not None
            self._load()
        return bool(wanted)

    def _send(self, number: int, ranks: list[int], content: Tensor | None) -> None:
        shard = self._shards[number]
        if len(ranks) == 1:
            dist.gather(shard, self._parts(content), dst=ranks[0])
            return
        _all_gather(shard.new_empty(len(shard) * self.size) if content is None else content, shard)

    def _parts(self, content: Tensor | None) -> list[Tensor] | None:
        return None if content is None else list(content.chunk(self.size))


class TeamMember:
    """Makes the team of a process. Process 0 opens the rendezvous, and the others connect to it.

    Args:
        rank: Number of the process.
        size: Number of processes.
        device: The device of the model.
        timeout_s: Time in seconds after which a process that does not answer counts as lost.
    """

    def __init__(self, rank: int, size: int, device: str, timeout_s: float) -> None:
        self._group = ProcessGroup(torch.device(device), timeout_s, rank, size)

    def open_rendezvous(self) -> tuple[str, int]:
        """Listen for the other processes. Returns host and port."""
        return self._group.open_rendezvous()

    def connect(self, host: str, port: int) -> Team:
        """Connect to the other processes, and make their team the team of this process.

        Raises:
            WorkerLostError: Not all processes connected.
        """
        global _current
        self._group.connect(host, port)
        _current = Team(self._group)
        return _current


def current_team() -> Team | None:
    """Return the team of this process, or None if this process is a worker of its own."""
    return _current


def _lost(operation: str) -> AbstractContextManager[None]:
    return lost_workers(f"the {operation} of the processes of a worker failed")


def _from_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
