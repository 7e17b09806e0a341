"""Files and folders that are either whole or not there.

The order is always: write new under a temporary name, make it durable, commit by rename, delete old. Temporary names
are fixed (``X.partial``, ``X.old``), so that the next writer of X clears what a killed one left behind; this relies on
there being one writer per path. After a crash at any instant a path is in one of these states:

    X                      committed
    X, X.partial           committed; the partial is litter
    X.old, X.partial       a folder's replacement was cut between its two renames: the next writer restores X.old first
    X, X.old               committed; the old one is litter

On an object store there are no temporary names; `npeff.storage.objects` says how the promises are kept there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from npeff.storage import objects
from npeff.storage.errors import os_errors_explained
from npeff.storage.location import is_remote

PARTIAL = ".partial"
OLD = ".old"
_AT_A_TIME = 8


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(paths: Iterable[Path]) -> None:
    """`fsync` of many, several at a time: the system writes them together, ten times as fast as one after the other."""
    with ThreadPoolExecutor(_AT_A_TIME, "fsync") as threads:
        list(threads.map(fsync, paths))


def make_directory(path: Path) -> None:
    """Create a folder and its missing parents, durably. Raises OSError."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


def write_file_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace the file `path` with what `write` puts into the stream it is given.

    Raises:
        StoreError: the file cannot be written. The former content of `path` is untouched.
    """
    if is_remote(path):
        buffer = BytesIO()
        write(buffer)
        objects.put(path, buffer.getvalue())
        return
    partial = path.with_name(path.name + PARTIAL)
    with os_errors_explained("write", path):
        make_directory(path.parent)
        try:
            with partial.open("wb") as stream:
                write(stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(path)
        except BaseException:
            with suppress(OSError):  # the first error is the one to report
                partial.unlink(missing_ok=True)
            raise
        fsync(path.parent)


def begin_directory(path: Path) -> Path:
    """An empty folder ``<path>.partial`` to fill and then hand to `commit_directory`; clears what a crash left."""
    with os_errors_explained("write", path):
        _restore(path)
        partial = path.with_name(path.name + PARTIAL)
        if partial.exists():
            shutil.rmtree(partial)
        make_directory(path.parent)
        partial.mkdir()
        return partial


def commit_directory(path: Path) -> None:
    """Make ``<path>.partial`` durable and put it in the place of `path`."""
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + OLD)
    with os_errors_explained("write", path):
        for folder, _, files in os.walk(partial, topdown=False):
            for name in files:
                fsync(Path(folder, name))
            fsync(Path(folder))
        if path.exists():
            path.rename(old)
        partial.rename(path)
        fsync(path.parent)
        if old.exists():
            shutil.rmtree(old)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """Create or replace the folder `path` by what the body writes into the folder it is given, a local one.

    Raises:
        StoreError: something cannot be written. Whatever the body raised, the former `path` is untouched; on an object
            store, where the error may come while it is being replaced, it is then gone, and not half there.
    """
    if is_remote(path):
        with objects.replacing_directory(path) as local:
            yield local
        return
    partial = begin_directory(path)
    try:
        with os_errors_explained("write", path):
            yield partial
        commit_directory(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            shutil.rmtree(partial, ignore_errors=True)
            _restore(path)
        raise


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A file as one that a library which knows local files only can read: itself, or a temporary copy of an object."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
        with os_errors_explained("read", path):
            objects.download_files(path.parent, Path(folder), [path.name])
        yield Path(folder, path.name)


def is_committed(path: Path) -> bool:
    """Whether a file, or a Zarr folder, is there, whole. Raises OSError."""
    return objects.exists(path) if is_remote(path) else path.exists()


def remove_directory(path: Path) -> None:
    """Remove a folder with all that is in it, as far as that is possible; there may be none."""
    if is_remote(path):
        objects.remove_directory(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _restore(path: Path) -> None:
    old = path.with_name(path.name + OLD)
    if not old.exists():
        return
    if path.exists():
        shutil.rmtree(old)
    else:
        old.rename(path)
