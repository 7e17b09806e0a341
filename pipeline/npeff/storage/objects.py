"""Reads and writes of objects in buckets, and the guarantees of `npeff.storage.atomic` there.

An object is complete or absent: a PUT or a multipart upload becomes visible when it is finished. There is no rename, so
a folder cannot be replaced atomically. Instead, the last file of a folder marks the folder as complete
(``zarr.json``, ``MANIFEST.json``; in the order of `_ordered`, files in subfolders come first). The last file is deleted
first and written last, so a reader that checks it never reads an incomplete folder. A stage's record is deleted before
the files that it describes.

Before each change, the lock of the run is confirmed (`npeff.storage.object_lock`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from npeff.storage.errors import ObjectStoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from npeff.storage.bucket_path import BucketPath

PART_BYTES = 50 * 2**20
"""Part size of multipart uploads, which are used for objects of at least twice this size."""
COMPLETION_FILE = "zarr.json"
"""The last file of a Zarr folder, which marks the folder as complete."""
_AT_ONCE = 16
"""Number of requests that are made at a time."""

_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True)
class Version:
    """One version of an object, for conditional writes."""

    e_tag: str | None
    version: str | None
    """The generation of the object, on Google Cloud Storage."""


@dataclass(frozen=True)
class Found:
    """An object with its content."""

    content: bytes
    version: Version
    last_modified: datetime
    """By the server's clock."""


def client_of(path: Path | BucketPath) -> ObjectStore:
    """Return obstore's client for the bucket of a path."""
    from npeff.storage.buckets import client  # which imports obstore, an extra

    return client(cast(Any, path).root)


def key_of(path: Path | BucketPath) -> str:
    """Return the key of a path in its bucket."""
    return str(cast(Any, path).key)


@contextmanager
def _request(path: Path | BucketPath) -> Iterator[tuple[ObjectStore, str]]:
    """Yield obstore's client and the key of a path, for a request whose errors are explained."""
    from npeff.storage.buckets import explained

    with explained(str(path)):
        yield client_of(path), key_of(path)


# Single objects


def read(path: Path | BucketPath) -> bytes:
    """Return the content of an object. Raises FileNotFoundError."""
    with _request(path) as (store, key):
        return store.get(key).bytes().to_bytes()


def find(path: Path | BucketPath) -> Found | None:
    """Return the content of an object with its version; None if it does not exist."""
    try:
        with _request(path) as (store, key):
            answer = store.get(key)
            meta = answer.meta
            content = answer.bytes().to_bytes()
    except FileNotFoundError:
        return None
    return Found(content, Version(meta["e_tag"], meta["version"]), meta["last_modified"])


def read_all(paths: Sequence[Path]) -> list[bytes | None]:
    """Return the content of several objects, in parallel and with one request each; None for a missing object."""

    def read_one(path: Path) -> bytes | None:
        try:
            return read(path)
        except FileNotFoundError:
            return None

    return _in_parallel(read_one, paths)


def read_range(path: Path | BucketPath, start: int, stop: int) -> bytes:
    """Return the bytes of an object from `start` up to, not including, `stop`; fewer if the object ends before."""
    if stop <= start:
        return b""
    with _request(path) as (store, key):
        return store.get_range(key, start=start, end=stop).to_bytes()


def size(path: Path | BucketPath) -> int | None:
    """Return the size of an object in bytes; None if it does not exist."""
    meta = _head(path)
    return None if meta is None else int(meta["size"])


def last_modified(path: Path | BucketPath) -> datetime | None:
    """Return the time of the last change of an object, by the server's clock; None if it does not exist."""
    meta = _head(path)
    return None if meta is None else cast(datetime, meta["last_modified"])


def _head(path: Path | BucketPath) -> Any:
    try:
        with _request(path) as (store, key):
            return store.head(key)
    except FileNotFoundError:
        return None
    except ObjectStoreError:
        read_range(path, 0, 1)  # raises an error with the reason, which the answer to HEAD does not contain
        raise


def exists(path: Path | BucketPath) -> bool:
    """Return whether an object, or a complete Zarr folder, exists."""
    return size(path / COMPLETION_FILE if path.suffix == ".zarr" else path) is not None


def put(path: Path, content: bytes) -> None:
    """Create or replace an object."""
    view = memoryview(content)
    _put(path, len(content), (view[start : start + PART_BYTES] for start in range(0, len(content), PART_BYTES)))


def _put(path: Path, n_bytes: int, parts: Iterator[bytes | memoryview]) -> None:
    """Create or replace an object with consecutive parts of `PART_BYTES` bytes, the last of which may be smaller."""
    from npeff.storage.buckets import confirm

    place = str(path)
    with _request(path) as (store, key):
        if n_bytes < 2 * PART_BYTES:
            content = b"".join(parts)
            confirm(place)
            store.put(key, content, use_multipart=False)
            return
        import obstore

        # Without `with`, which would complete the upload after an error. The lock is confirmed before each part.
        writer = obstore.open_writer(store, key, buffer_size=PART_BYTES, max_concurrency=4)
        for part in parts:
            confirm(place)
            writer.write(part)
        confirm(place)
        writer.close()


def put_unguarded(path: Path | BucketPath, content: bytes) -> None:
    """Create or replace a small object without a confirmation of the lock."""
    with _request(path) as (store, key):
        store.put(key, content, use_multipart=False)


def put_all(contents: Mapping[Path, bytes]) -> None:
    """Create or replace several objects in parallel, in any order."""
    _in_parallel(lambda item: put(*item), list(contents.items()))


def create(path: Path, content: bytes) -> bool:
    """Create an object unless it exists, and return whether it was created."""
    from npeff.storage.buckets import confirm

    confirm(str(path))
    return put_if(path, content, None) is not None


def put_if(path: Path | BucketPath, content: bytes, replaced: Version | None) -> Version | None:
    """Write an object if its current version is `replaced`, or, if that is None, if it does not exist.

    Returns the new version; None if the condition does not hold. The lock is not confirmed.
    """
    known = {} if replaced is None else {"e_tag": replaced.e_tag, "version": replaced.version}
    mode: Any = {name: value for name, value in known.items() if value is not None} or "create"
    try:
        with _request(path) as (store, key):
            answer = store.put(key, content, mode=mode)
    except (FileExistsError, FileNotFoundError):
        return None
    return Version(answer["e_tag"], answer["version"])


def delete(paths: Iterable[Path | BucketPath]) -> None:
    """Delete objects of one bucket, in any order. Missing objects are ignored."""
    from npeff.storage.buckets import confirm

    listed = list(paths)
    for path in listed:
        confirm(str(path))
    if not listed:
        return
    one_by_one = not str(listed[0]).startswith("s3://") or len(listed) == 1  # only S3 deletes many in one request

    def delete_one(path: Path | BucketPath) -> None:
        try:
            with _request(path) as (store, key):
                store.delete(key)
        except FileNotFoundError:
            pass

    if one_by_one:
        _in_parallel(delete_one, listed)
        return
    with _request(listed[0]) as (store, _):
        store.delete([key_of(path) for path in listed])


class ObjectFile:
    """An object as a read-only file for pyarrow. Every read is one request."""

    closed = False

    def __init__(self, path: Path | BucketPath) -> None:
        n_bytes = size(path)
        if n_bytes is None:
            raise FileNotFoundError(str(path))
        self._path, self._size, self._place = path, n_bytes, 0

    def read(self, n_bytes: int = -1) -> bytes:
        stop = self._size if n_bytes < 0 else min(self._place + n_bytes, self._size)
        content = read_range(self._path, self._place, stop)
        self._place += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    seekable = readable

    def writable(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True


# Folders


def files(folder: Path | BucketPath) -> dict[str, dict[str, Any]]:
    """Return the metadata of every object in a folder, at any depth, by its path relative to the folder.

    The metadata have the keys ``size``, ``e_tag`` and ``last_modified``.
    """
    prefix = key_of(folder) + "/"
    with _request(folder) as (store, key):
        found = [meta for batch in store.list(key, chunk_size=1000) for meta in batch]
    return {meta["path"].removeprefix(prefix): dict(meta) for meta in found if meta["path"].startswith(prefix)}


def entries(folder: Path | BucketPath) -> list[str]:
    """Return the sorted names of the objects and folders directly in a folder."""
    with _request(folder) as (store, key):
        found = store.list_with_delimiter(key)
    paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
    prefix = key_of(folder) + "/"
    return sorted(path.rstrip("/").removeprefix(prefix) for path in paths)


def has_objects(folder: Path | BucketPath) -> bool:
    """Return whether there is an object in a folder, at any depth."""
    with _request(folder) as (store, key):
        return next(iter(store.list(key, chunk_size=1)), None) is not None


def download_files(folder: Path, local: Path, names: list[str]) -> None:
    """Copy the named objects of a folder to a local folder in parallel."""

    def download(name: str) -> None:
        path = folder / name
        with _request(path) as (store, key), open(local / name, "wb") as file:
            for chunk in store.get(key).stream(min_chunk_size=PART_BYTES):
                file.write(chunk)

    _in_parallel(download, names)


def remove_directory(folder: Path) -> None:
    """Delete all objects of a folder, those that mark it as complete first."""
    names = _ordered(files(folder))
    for chosen in ([name for name in names if "/" not in name], [name for name in names if "/" in name]):
        delete([folder / name for name in chosen])


@contextmanager
def replacing_directory(folder: Path) -> Iterator[Path]:
    """Yield an empty local folder, and replace `folder` with its files after the body."""
    with tempfile.TemporaryDirectory(prefix="npeff-") as temporary:
        local = Path(temporary) / folder.name
        local.mkdir()
        yield local
        upload_directory(local, folder)


def upload_directory(local: Path, folder: Path) -> None:
    """Replace the content of `folder` with the files of a local folder."""
    remove_directory(folder)
    names = _ordered(file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file())
    for chosen in (names[:-1], names[-1:]):
        upload_files(local, folder, chosen)


def upload_files(local: Path, folder: Path, names: list[str]) -> None:
    """Upload the named files of a local folder in parallel, in any order."""

    def upload(name: str) -> None:
        with open(local / name, "rb") as file:
            _put(folder / name, os.fstat(file.fileno()).st_size, iter(lambda: file.read(PART_BYTES), b""))

    _in_parallel(upload, names)


def _in_parallel(function: Callable[[_A], _B], items: Sequence[_A]) -> list[_B]:
    """Call a function for every item, several at a time. The error of the first item that fails is raised."""
    if len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(min(_AT_ONCE, len(items)), "requests") as threads:
        return list(threads.map(function, items))


def _ordered(names: Any) -> list[str]:
    return sorted(names, key=lambda name: (-name.count("/"), name))
