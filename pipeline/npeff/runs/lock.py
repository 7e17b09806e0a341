"""The lock of a run directory: one process per run at a time."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from npeff.errors import tell
from npeff.runs.errors import RunDirectoryError
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.file_lock import lock_file
from npeff.storage.location import is_remote

_WORKERS_END_S = 60.0
"""Longest wait for the workers of an earlier command to end."""

_TELL_AFTER_S = 5.0
"""Time in seconds of waiting after which a line tells what is waited for."""

LEASE = ".workers"
"""File on which every worker of a run holds a shared lock until it ends."""

_held: set[Path] = set()
"""Runs whose lock this process holds."""


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Lock a run directory for this process.

    The kernel releases the lock when the process ends for any reason. On an object store, the lock of a killed process
    expires after a minute (`npeff.storage.object_lock`). The lock may be taken repeatedly in one process, for example
    by the pipeline and by its stages. Workers of a killed command may outlive it by seconds and may still write, so
    this waits until they have ended.

    Raises:
        RunDirectoryError: Another process uses the run, workers of an earlier command do not end, or the directory is
            missing, cannot be written, or is on a file system without locks.
    """
    if path in _held:
        yield
        return
    with _remote_lock(path) if is_remote(path) else _local_lock(path):
        _held.add(path)
        try:
            yield
        finally:
            _held.remove(path)


@contextmanager
def _remote_lock(path: Path) -> Iterator[None]:
    from npeff.storage.object_lock import LOCK, HeldError, object_lock

    try:
        with object_lock(path / LOCK, _owner()):
            yield
    except HeldError as error:
        raise _in_use(path, error.owner) from None


@contextmanager
def _local_lock(path: Path) -> Iterator[None]:
    try:
        file = open(path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise RunDirectoryError(
            f"cannot write to {path} ({error.strerror})", "fix this or choose another run_dir", path=path
        ) from None
    with file:
        if not _locked(file, path / ".lock"):
            file.seek(0)
            raise _in_use(path, file.read().strip() or "starting")
        _write_owner(file, path / ".lock")
        _wait_for_former_workers(path)
        yield


def _write_owner(file: IO[str], path: Path) -> None:
    try:
        with os_errors_explained("write", path):
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), _owner().encode())  # unbuffered: closing the file does not write again
    except StoreError as error:
        raise RunDirectoryError.of(error) from None


def _wait_for_former_workers(path: Path) -> None:
    began, told = time.monotonic(), False
    deadline = began + _WORKERS_END_S
    with open(path / LEASE, "a", encoding="utf-8") as lease:
        while not _locked(lease, path / LEASE):
            if time.monotonic() > deadline:
                raise RunDirectoryError(
                    f"workers of an earlier command are still running and may write to {path}",
                    "stop their processes, which are called ray::WorkerActor, and run the same command again",
                    path=path,
                )
            if not told and time.monotonic() - began > _TELL_AFTER_S:
                told = True
                tell(f"waiting for the workers of an earlier command on {path} to end, at most {_WORKERS_END_S:.0f} s")
            time.sleep(0.05)


def _locked(file: IO[str], path: Path) -> bool:
    try:
        return lock_file(file, path, wait=False, elsewhere="choose a run_dir on another file system or in a bucket")
    except StoreError as error:
        raise RunDirectoryError.of(error) from None


def _in_use(path: Path, by: str) -> RunDirectoryError:
    remedy = "wait until it ends, stop it, or choose another run_dir"
    return RunDirectoryError(f"{path} is in use by another command ({by})", remedy, path=path)


def _owner() -> str:
    return f"process {os.getpid()} on {platform.node()}"
