"""The actor of a worker, or of one process of a worker: it sets up its process and runs the worker of a role."""

from __future__ import annotations

import fcntl
import platform
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

from npeff.execution.executor import ExecutorError, WorkerLostError, WorkerSpec, is_item_error, reason_of
from npeff.execution.team import Team, TeamMember


@dataclass(frozen=True)
class Role:
    """The worker that an actor runs. One actor can have several roles in turn, because starting an actor is slow."""

    spec: WorkerSpec
    more: dict[str, Any] = field(default_factory=dict)
    """Further arguments for the worker's constructor."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass(frozen=True)
class Failure:
    reason: str


class WorkerActor:
    """One process of a worker.

    The first call constructs the worker. An error of the worker's constructor, such as a missing data set, is thus
    raised by that call. An error in the constructor of the actor would look like a lost process.

    Args:
        threads: Number of torch's threads.
        member: Connects the processes of the worker; None if it has one process.
        rank: Number of the process in the worker.
    """

    def __init__(self, threads: int, member: TeamMember | None = None, rank: int = 0) -> None:
        torch.set_num_threads(threads)
        self._member, self._rank = member, rank
        self._team: Team | None = None
        self._key: str | None = None
        self._worker: Any = None
        self._lease: Any = None

    def open_rendezvous(self) -> tuple[str, int]:
        """In the first process, listen for the others. Returns host and port."""
        assert self._member is not None
        return self._member.open_rendezvous()

    def connect(self, address: tuple[str, int]) -> None:
        """Connect the processes of the worker. They call this method together."""
        assert self._member is not None
        self._team = self._member.connect(*address)

    def call(self, role: Role, method: str, *arguments: Any) -> Any:
        self._become(role)
        result = None if self._helps(role) else getattr(self._worker, method)(*arguments)
        if self._team is not None:
            self._team.serve()
        return None if self._rank else result

    def call_item(self, role: Role, method: str, item: Any) -> Any:
        """Return an error that may be specific to the item as a `Failure`; raise errors of the constructor."""
        self._become(role)
        try:
            return self.call(role, method, item)
        except Exception as error:
            if not is_item_error(error):
                raise
            return Failure(reason_of(error))

    def _helps(self, role: Role) -> bool:
        """Return whether this process only serves the first process of the worker."""
        return self._rank > 0 and role.spec.helper is not None

    def _become(self, role: Role) -> None:
        if self._member is not None and self._team is None:
            raise WorkerLostError("the processes of the worker are not connected")
        if self._key != role.key:
            self._worker, self._key = None, None
            if self._lease is not None:
                self._lease.close()
            if role.spec.lease is not None:
                self._lease = open(role.spec.lease, "a")  # noqa: SIM115 - held as long as this process has the role
                _share_lock(self._lease, role.spec.lease)
            helper = role.spec.helper if self._helps(role) else None
            self._worker = role.spec.construct(**role.more) if helper is None else helper.construct()
            self._key = role.key


def _share_lock(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:  # the node may mount the folder in another way than the command
        raise ExecutorError(
            f"the file system of {path.parent} does not support locks on {platform.node()} ({error.strerror})",
            "mount it there with locks (on Lustre, with the option flock), or choose a run_dir on another file system "
            "or in a bucket",
            path=path.parent,
        ) from None
