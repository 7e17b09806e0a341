"""Zarr groups with a kind and a schema version in their attributes, and with one-line error messages."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import zarr
from zarr.abc.buffer import Buffer, BufferPrototype
from zarr.abc.store import ByteRequest
from zarr.buffer import default_buffer_prototype
from zarr.storage import MemoryStore, ObjectStore, StorePath

from npeff.storage import objects
from npeff.storage.atomic import PARTIAL, fsync_all, is_committed, write_file_atomically
from npeff.storage.bucket_path import BucketPath
from npeff.storage.checksums import SEAL, read_json, sealed, unsealed
from npeff.storage.commands import run_argument
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.fast_codecs import accelerated
from npeff.storage.location import is_remote

METADATA = "zarr.json"


def create_group(folder: Path, kind: str, version: int, own: Mapping[str, Any], attrs: Mapping[str, Any]) -> zarr.Group:
    """Create a group in the empty `folder`.

    Args:
        folder: The folder of the group.
        kind: What the group stores, for error messages.
        version: Schema version.
        own: Attributes of the format (JSON).
        attrs: Attributes of the caller (JSON).

    Raises:
        ValueError: `attrs` redefines an attribute of the format, or an attribute is not JSON.
    """
    own = {"kind": kind, "schema_version": version, **own}
    if clash := sorted({*own, SEAL} & set(attrs)):
        raise ValueError(f"attrs may not redefine {clash}")
    # the round trip through JSON refuses NaN, and makes the attributes equal to those that are read
    attributes = sealed(json.loads(json.dumps({**own, **attrs}, allow_nan=False)))
    return zarr.create_group(folder, attributes=attributes)


def open_group(path: Path, kind: str, version: int, command: str) -> tuple[zarr.Group, dict[str, Any]]:
    """Open the group at `path`, which `npeff <command>` writes, and return it with its attributes.

    Raises:
        StoreError: The group is missing or damaged, or has another kind or schema version.
    """
    absent = StoreError(f"{path} does not exist", f"run `npeff {command} {run_argument(path)}` first", path=path)
    with os_errors_explained("read", path):
        exists = is_remote(path) or path.is_dir()
    if not exists:
        raise absent
    try:
        metadata = read_json(path / METADATA)
    except StoreError as error:
        if is_remote(path) and isinstance(error.__cause__, FileNotFoundError):
            raise absent from None
        raise damaged_metadata(path, "", command) from error
    attrs = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(attrs, dict) or attrs.get("kind") != kind:
        raise StoreError(f"{path} is not {kind}", "choose another run_dir", path=path)
    if attrs.get("schema_version") != version:
        raise StoreError(
            f"{path} has schema version {attrs.get('schema_version')}, but this program reads version {version}",
            "use the version that wrote it, or choose another run_dir",
            path=path,
        )
    try:
        return _group(path, metadata), unsealed(attrs)
    except (KeyError, ValueError, TypeError) as error:
        raise damaged_metadata(path, "", command) from error


def restore_metadata(path: Path, create: Callable[[Path], object]) -> None:
    """Write the missing ``zarr.json`` files of a group. Its content stays.

    Args:
        path: The group.
        create: Creates the same group, without content, at the path that it receives.

    Raises:
        StoreError: A file cannot be written.
    """
    with os_errors_explained("write", path), tempfile.TemporaryDirectory(prefix="npeff-") as folder:
        fresh = Path(folder, path.name)
        create(fresh)
        for source in sorted(fresh.rglob(METADATA)):
            target = path / source.relative_to(fresh).as_posix()
            if not is_committed(target):
                write_file_atomically(target, partial(_copy, source))


def _copy(source: Path, stream: BinaryIO) -> None:
    stream.write(source.read_bytes())


def open_array(
    group: zarr.Group, path: Path, name: str, command: str, *, empty_chunks: bool = False
) -> zarr.Array[Any]:
    """Return one array of the group at `path`.

    Args:
        group: The group.
        path: Its path.
        name: Name of the array.
        command: The command that writes the group.
        empty_chunks: Whether to write chunks that equal the fill value.

    Raises:
        StoreError: The array is missing or its metadata are damaged.
    """
    try:
        array = group[name]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise damaged_metadata(path, name, command) from error
    if not isinstance(array, zarr.Array):  # its node_type is damaged
        raise damaged_metadata(path, name, command)
    if empty_chunks:
        array = array.with_config({"write_empty_chunks": True})
    return array if is_remote(path) else accelerated(array)


def _group(path: Path, metadata: Mapping[str, Any]) -> zarr.Group:
    """Return the group at `path` with this metadata, which on an object store are not requested again."""
    if not is_remote(path):
        return zarr.open_group(path, mode="r+")
    store = StorePath(_Bucket(cast(BucketPath, path)), objects.key_of(path))
    return zarr.Group(zarr.AsyncGroup.from_dict(store, dict(metadata)))


class _Bucket(ObjectStore[Any]):
    """The objects of a bucket for Zarr, read-only, with one-line error messages."""

    def __init__(self, path: BucketPath) -> None:
        super().__init__(objects.client_of(path), read_only=True)
        self._root = path.root

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        from npeff.storage.buckets import explained

        with explained(f"{self._root}/{key}"):
            return await super().get(key, prototype, byte_range)


def damaged_metadata(path: Path, name: str, command: str) -> StoreError:
    """Return the error for the damaged ``zarr.json`` of array `name`, or of the group at `path` if `name` is empty."""
    file = path / name / METADATA
    remedy = f"delete {path} and run `npeff {command} {run_argument(path)}` again"
    return StoreError(f"{file} is damaged", remedy, path=file)


def stored_path(group_path: Path, name: str, array: zarr.Array[Any], index: int) -> Path:
    """Return the file of the `index`-th shard of an array that is split along its first axis only.

    For an array without shards, it is the file of the `index`-th chunk.
    """
    return group_path / name / _chunk_key(array, index)


def _chunk_key(array: zarr.Array[Any], index: int) -> str:
    return array.metadata.encode_chunk_key((index, *[0] * (array.ndim - 1)))


def read_objects(group_path: Path, arrays: Mapping[str, zarr.Array[Any]], index: int) -> dict[str, bytes | None]:
    """Return the content of the object with the `index`-th shard, or chunk, of each array; None if it is missing.

    The group is on an object store. Every object is read with one request, and all objects in parallel.
    """
    paths = [stored_path(group_path, name, array, index) for name, array in arrays.items()]
    return dict(zip(arrays, objects.read_all(paths), strict=True))


def decoded(array: zarr.Array[Any], index: int, content: bytes, rows: slice) -> np.ndarray:
    """Return consecutive rows of an array, all in its `index`-th shard, or chunk, from the content of that object.

    Raises:
        ValueError: The content is corrupt.
    """
    stored = {_chunk_key(array, index): default_buffer_prototype().buffer.from_bytes(content)}
    in_memory = dataclasses.replace(array.async_array, store_path=StorePath(MemoryStore(stored)))
    return np.asarray(zarr.Array(in_memory)[rows])


def stored_bytes(path: Path) -> int:
    """Return the size of a file in bytes; 0 if the file does not exist."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


@dataclasses.dataclass(frozen=True)
class Part:
    """All rows of the `index`-th shard, or chunk, of an array."""

    name: str
    array: zarr.Array[Any]
    index: int
    rows: int | slice
    values: np.ndarray


def write_durably(group_path: Path, parts: Iterator[Part]) -> None:
    """Write parts of the arrays of a group durably: they survive a power failure.

    Raises:
        StoreError: A part cannot be written. Other parts are unchanged; this part may be missing.
    """
    if is_remote(group_path):
        objects.put_all(dict(_encoded(group_path, part) for part in parts))
        return
    files, folders = list[Path](), dict[Path, None]()
    for part in parts:
        path = stored_path(group_path, part.name, part.array, part.index)
        with os_errors_explained("write", path):
            for litter in path.parent.glob(f"{path.name}.*{PARTIAL}"):  # from a writer that was killed inside Zarr
                litter.unlink()
            path.unlink(missing_ok=True)  # Zarr would read an existing shard first, and fail if it is corrupt
            try:
                part.array[part.rows] = part.values
            except BaseException:
                with suppress(OSError):  # the first error is the one to report
                    path.unlink(missing_ok=True)
                raise
            files.append(path)
            folders |= dict.fromkeys(each for each in path.parents if each.is_relative_to(group_path))
    with os_errors_explained("write", group_path):
        fsync_all(files)
        fsync_all(folders)


def _encoded(group_path: Path, part: Part) -> tuple[Path, bytes]:
    """Return the path and the content of the object that stores a part.

    Zarr encodes the content in memory. A direct write by Zarr would require that an existing object is deleted first,
    so a second worker with the same shard would delete the object that the first worker has recorded.
    """
    made: dict[str, Buffer] = {}
    in_memory = StorePath(MemoryStore(made), part.name)
    zarr.Array(dataclasses.replace(part.array.async_array, store_path=in_memory))[part.rows] = part.values
    path = stored_path(group_path, part.name, part.array, part.index)
    (content,) = made.values()
    return path, content.to_bytes()
