"""Atomic creation and replacement of files and folders: a path is either complete or absent.

Every write has the same steps: write the new content under a temporary name, make it durable, commit it by a rename,
and delete the old content. Temporary names are fixed (``X.partial``, ``X.old``), so the next writer of X removes the
leftovers of a killed writer. This requires that each path has one writer. After a crash at any time, a path is in one
of these states:

    X                      committed
    X, X.partial           committed; X.partial is a leftover
    X.old, X.partial       the replacement of a folder stopped between its two renames: the next writer restores X.old
    X, X.old               committed; X.old is a leftover

An object store has no temporary names; `npeff.storage.objects` describes the guarantees there.
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
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote

PARTIAL = ".partial"
OLD = ".old"
_FSYNC_THREADS = 8


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_all(paths: Iterable[Path]) -> None:
    """`fsync` several files or folders in parallel, about ten times as fast as in sequence."""
    with ThreadPoolExecutor(_FSYNC_THREADS, "fsync") as threads:
        list(threads.map(fsync, paths))


def make_directory(path: Path) -> None:
    """Create a folder and its missing parents durably. Raises OSError."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


def write_file_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace the file `path`.

    Args:
        path: The file.
        write: Writes the content to the stream that it receives.

    Raises:
        StoreError: The file cannot be written. The previous content of `path` is unchanged.
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
    """Create the empty folder ``<path>.partial``, to be filled and then committed by `commit_directory`.

    Leftovers of a crashed writer are removed.
    """
    with os_errors_explained("write", path):
        _restore(path)
        partial = path.with_name(path.name + PARTIAL)
        if partial.exists():
            shutil.rmtree(partial)
        make_directory(path.parent)
        partial.mkdir()
        return partial


def commit_directory(path: Path) -> None:
    """Make ``<path>.partial`` durable and replace `path` with it."""
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
    """Create or replace the folder `path` with the files that the body writes to a local folder.

    Yields:
        The local folder to write to.

    Raises:
        StoreError: The folder cannot be written. The previous `path` is unchanged whenever the body raises. On an
            object store, an error may also occur during the replacement; the folder is then absent, never incomplete.
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


def refuse_not_empty(path: Path) -> None:
    """Check that a folder can be written without a loss: that it does not exist, or is empty.

    Raises:
        StoreError: It is a file, or contains something.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise StoreError(f"{path} exists and is not an empty folder", "choose another folder", path=path)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield a local path of a file, for libraries that read local files only: the path, or a temporary copy."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="npeff-") as folder:
        with os_errors_explained("read", path):
            objects.download_files(path.parent, Path(folder), [path.name])
        yield Path(folder, path.name)


def is_committed(path: Path) -> bool:
    """Return whether a file or a Zarr folder is complete at `path`. Raises OSError."""
    return objects.exists(path) if is_remote(path) else path.exists()


def remove_directory(path: Path) -> None:
    """Remove a folder and its content, if it exists. Errors of a local file system are ignored."""
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
