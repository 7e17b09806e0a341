"""The lock of a run on an object store: an object that names its holder, created and renewed by conditional requests.

A killed process cannot release the lock, which the kernel does on a local disk. The holder therefore renews the lock,
and a lock that was not renewed for a minute may be taken over. The minute is measured by the server's clock: a process
that finds a lock writes the object ``.clock`` beside it and compares the times of the last change of both objects. The
clocks of the machines do not matter. Every renewal changes the object and its version, which the next conditional
request contains. If two processes take over a lock, one of them succeeds. A former holder detects the loss before it
writes anything (`npeff.storage.buckets.guards`).

No provider deletes an object on a condition of its version. The holder therefore releases the lock by a conditional
write of a *tombstone*, a lock without an owner, which stays and which the next holder replaces.

The holder draws a random *token*. A request whose response was lost is repeated, and the repetition fails if the first
request succeeded. The process detects this case by its own token in the object.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from npeff.errors import NpeffError, tell
from npeff.storage import objects
from npeff.storage.buckets import guards
from npeff.storage.errors import ObjectStoreError

LOCK = ".lock"
"""Name of the lock object of a run."""
CLOCK = ".clock"
"""Name of the object that is written to read the server's clock."""
RENEW_S = 10.0
STALE_S = 60.0
_POLL_S = 2.0

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
"""A clock that includes the time for which the machine is suspended, where there is one."""


class HeldError(Exception):
    """Another process, `owner`, holds the lock."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner


@contextmanager
def object_lock(path: Path, owner: str) -> Iterator[None]:
    """Hold the lock `path` of all objects in its folder.

    This process cannot write to the folder after it has lost the lock. If the lock exists, this waits until another
    process renews it, or until it is a minute old and can be taken over.

    Raises:
        HeldError: Another process renews the lock.
        ObjectStoreError: A request fails. If the lock was taken over, the writes of the body raise this error, and
            it replaces other errors of the body.
    """
    lock = _ObjectLock(path, owner)
    lock.acquire()
    folder = f"{path.parent}/"
    guards[folder] = lock
    keeper = threading.Thread(target=lock.keep, name="lock", daemon=True)
    keeper.start()
    try:
        yield
    except (NpeffError, OSError):
        lock.explain()
        raise
    finally:
        lock.ended.set()
        keeper.join()
        del guards[folder]
        lock.release()


@dataclass(frozen=True)
class _Seen:
    owner: str
    token: str
    """Empty in a tombstone."""
    version: objects.Version
    last_modified: datetime


class _ObjectLock:
    def __init__(self, path: Path, owner: str) -> None:
        self.ended = threading.Event()
        self._path, self._owner, self._token = path, owner, secrets.token_hex(16)
        self._version: objects.Version | None = None
        self._renewals, self._renewed_at = 0, 0.0
        self._lost_to: str | None = None

    def acquire(self) -> None:
        before: _Seen | None = None
        while True:
            found = self._look()
            if found is not None and found.token == self._token:
                self._adopt(found, _now())
                return
            if found is None or not found.token or self._age_s(found) > STALE_S:
                if self._put(None if found is None else found.version):
                    return
                continue  # another process was faster, or the response was lost
            if before is not None and before.version != found.version:
                raise HeldError(found.owner)
            if before is None:
                left, held = max(0.0, STALE_S - self._age_s(found)), self._path.parent
                tell(f"waiting for the lock of {held}: unless {found.owner} renews it, it is free in {left:.0f} s")
            before = found
            time.sleep(_POLL_S)

    def keep(self) -> None:
        """Renew the lock until it ends or is lost."""
        while not self.ended.wait(RENEW_S) and self._lost_to is None:
            with suppress(ObjectStoreError):  # the next renewal may succeed; `confirm` raises if none does
                self._renew()

    def confirm(self) -> None:
        began = _now()
        while self._lost_to is None and _now() - self._renewed_at > STALE_S / 2:
            if _now() - began > STALE_S:
                raise ObjectStoreError(
                    f"the lock {self._path} could not be renewed for {_now() - self._renewed_at:.0f} s; finished work "
                    "is kept: check the network and run the same command again to resume"
                )
            time.sleep(_POLL_S / 4)
        self._refuse_if_lost()

    def explain(self) -> None:
        """Raise the error of a lost lock, which can be the cause of another error: the new holder deletes files."""
        with suppress(ObjectStoreError):
            self._renew()
        self._refuse_if_lost()

    def _refuse_if_lost(self) -> None:
        if self._lost_to is not None:
            raise ObjectStoreError(
                f"another process ({self._lost_to}) took over {self._path.parent}, because this process did not renew "
                "its lock in time: wait for the other process to end and run the same command again"
            )

    def release(self) -> None:
        if self._lost_to is None:
            with suppress(ObjectStoreError):  # the lock then expires
                objects.put_if(self._path, json.dumps({"owner": "", "token": ""}).encode(), self._version)

    def _renew(self) -> None:
        began = _now()
        if self._put(self._version):
            return
        found = self._look()
        if found is not None and found.token == self._token:
            self._adopt(found, began)
        else:
            self._lost_to = (found.owner if found is not None else "") or "which has ended"

    def _put(self, replaced: objects.Version | None) -> bool:
        """Write the lock if its version is `replaced`, or if there is none, and return whether it was written."""
        began, self._renewals = _now(), self._renewals + 1
        content = {"owner": self._owner, "token": self._token, "renewals": self._renewals}
        version = objects.put_if(self._path, json.dumps(content).encode(), replaced)
        if version is None:
            return False
        self._version, self._renewed_at = version, began
        return True

    def _adopt(self, found: _Seen, began: float) -> None:
        self._version, self._renewed_at = found.version, began

    def _look(self) -> _Seen | None:
        found = objects.find(self._path)
        if found is None:
            return None
        try:
            content = json.loads(found.content)
            owner, token = str(content["owner"]), str(content["token"])
        except (ValueError, KeyError, TypeError):
            owner, token = "unknown", "unknown"
        return _Seen(owner, token, found.version, found.last_modified)

    def _age_s(self, found: _Seen) -> float:
        """Return the seconds since a lock was renewed, by the server's clock."""
        clock = self._path.with_name(CLOCK)
        while True:
            objects.put_unguarded(clock, self._token.encode())
            if (now := objects.last_modified(clock)) is not None:
                return (now - found.last_modified).total_seconds()


def _now() -> float:
    return time.clock_gettime(_CLOCK)
