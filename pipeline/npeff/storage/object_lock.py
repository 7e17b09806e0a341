"""The lock of a run on an object store: an object that names its holder, created and renewed by conditional requests.

A killed process cannot release the lock, which the kernel does on a local disk. The holder therefore renews the lock,
and a lock that was not renewed for a minute may be taken over. The minute is measured by the server's clock (the Date
of its response minus the object's LastModified); the clocks of the machines do not matter. Every renewal changes the
object and its ETag, which the next conditional request contains. If two processes take over a lock, one of them
succeeds. A former holder detects the loss before it writes anything (`npeff.storage.s3.guards`).

The holder draws a random *token*. botocore repeats a request whose response was lost, and the repetition fails if the
first request succeeded. The process detects this case by its own token in the object.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from fsspec.asyn import sync

from npeff.storage.errors import ObjectStoreError
from npeff.storage.objects import file_system, key_of
from npeff.storage.s3 import guards

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
        ObjectStoreError: A request fails. If the lock was taken over, the writes of the body raise this error.
    """
    lock = _ObjectLock(path, owner)
    lock.acquire()
    folder = key_of(path.parent) + "/"
    guards[folder] = lock
    keeper = threading.Thread(target=lock.keep, name="lock", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        lock.ended.set()
        keeper.join()
        del guards[folder]
        lock.release()


@dataclass(frozen=True)
class _Seen:
    owner: str
    token: str
    etag: str
    age_s: float
    """Seconds since the lock was renewed."""


class _ObjectLock:
    def __init__(self, path: Path, owner: str) -> None:
        self.ended = threading.Event()
        self._path, self._fs, self._owner, self._token = path, file_system(path), owner, secrets.token_hex(16)
        self._bucket, _, self._key = key_of(path).partition("/")
        self._etag, self._renewals, self._renewed_at = "", 0, 0.0
        self._lost_to: str | None = None

    def acquire(self) -> None:
        before: _Seen | None = None
        while not self._put(IfNoneMatch="*"):
            found = self._look()
            if found is None:
                continue  # the lock was released in the meantime
            if found.token == self._token:
                self._adopt(found, _now())
                return
            if before is not None and before.etag != found.etag:
                raise HeldError(found.owner)
            if found.age_s > STALE_S and self._put(IfMatch=found.etag):
                return
            before = found
            time.sleep(_POLL_S)

    def keep(self) -> None:
        """Renew the lock until it ends or is lost."""
        while not self.ended.wait(RENEW_S) and self._lost_to is None:
            with suppress(ObjectStoreError):  # the next renewal may succeed; `confirm` raises if none does
                self._renew()

    async def confirm(self) -> None:
        began = _now()
        while self._lost_to is None and _now() - self._renewed_at > STALE_S / 2:
            if _now() - began > STALE_S:
                raise ObjectStoreError(
                    f"the lock {self._path} could not be renewed for {_now() - self._renewed_at:.0f} s; finished work "
                    "is kept: check the network and run the same command again to resume"
                )
            await asyncio.sleep(_POLL_S / 4)
        if self._lost_to is not None:
            raise ObjectStoreError(
                f"another process ({self._lost_to}) took over {self._path.parent}, because this process did not renew "
                "its lock in time: wait for the other process to end and run the same command again"
            )

    def release(self) -> None:
        if self._lost_to is None:
            with suppress(ObjectStoreError, FileExistsError, FileNotFoundError):  # the lock then expires
                self._fs.call_s3("delete_object", Bucket=self._bucket, Key=self._key, IfMatch=self._etag)

    def _renew(self) -> None:
        began = _now()
        if self._put(IfMatch=self._etag):
            return
        found = self._look()
        if found is not None and found.token == self._token:
            self._adopt(found, began)
        else:
            self._lost_to = found.owner if found is not None else "which has ended"

    def _put(self, **condition: str) -> bool:
        """Write the lock if the condition holds, and return whether it holds."""
        began, self._renewals = _now(), self._renewals + 1
        content = {"owner": self._owner, "token": self._token, "renewals": self._renewals}
        body = json.dumps(content).encode()
        try:
            answer = self._fs.call_s3("put_object", Bucket=self._bucket, Key=self._key, Body=body, **condition)
        except (FileExistsError, FileNotFoundError):
            return False
        self._etag, self._renewed_at = answer["ETag"], began
        return True

    def _adopt(self, found: _Seen, began: float) -> None:
        self._etag, self._renewed_at = found.etag, began

    def _look(self) -> _Seen | None:
        async def read() -> tuple[Any, bytes]:
            answer = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=self._key)
            async with answer["Body"] as body:
                return answer, await body.read()

        try:
            answer, body = sync(self._fs.loop, read)
        except FileNotFoundError:
            return None
        try:
            content = json.loads(body)
            owner, token = str(content["owner"]), str(content["token"])
        except (ValueError, KeyError, TypeError):
            owner, token = "unknown", ""
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return _Seen(owner, token, answer["ETag"], (now - answer["LastModified"]).total_seconds())


def _now() -> float:
    return time.clock_gettime(_CLOCK)
