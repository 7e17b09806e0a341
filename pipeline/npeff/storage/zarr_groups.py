"""Zarr groups that say what they are: a kind and a schema version in their attributes, and errors of one line."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.storage import FsspecStore, MemoryStore, StorePath

from npeff.storage import objects
from npeff.storage.atomic import PARTIAL, fsync_all, is_committed, write_file_atomically
from npeff.storage.checksums import SEAL, read_json, sealed, unsealed
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote

METADATA = "zarr.json"


def create_group(folder: Path, kind: str, version: int, own: Mapping[str, Any], attrs: Mapping[str, Any]) -> zarr.Group:
    """A new group in the empty `folder`; `own` are attributes of its format, `attrs` those of its user (both JSON).

    Raises:
        ValueError: `attrs` redefines an attribute of the format, or something is not JSON.
    """
    own = {"kind": kind, "schema_version": version, **own}
    if clash := sorted({*own, SEAL} & set(attrs)):
        raise ValueError(f"attrs may not redefine {clash}")
    # through JSON and back, so that NaN is refused here and what is read equals what was written
    attributes = sealed(json.loads(json.dumps({**own, **attrs}, allow_nan=False)))
    return zarr.create_group(folder, attributes=attributes)


def open_group(path: Path, kind: str, version: int, command: str) -> tuple[zarr.Group, dict[str, Any]]:
    """The group at `path`, which `npeff <command>` writes, and its attributes.

    Raises:
        StoreError: there is none, or it is damaged, something else, or of another schema version.
    """
    with os_errors_explained("read", path):
        exists = is_committed(path) if is_remote(path) else path.is_dir()
    if not exists:
        raise StoreError(f"{path} does not exist", f"run `npeff {command} {path.parent}` first", path=path)
    try:
        metadata = read_json(path / METADATA)
    except StoreError as error:
        raise damaged_metadata(path, "", command) from error
    attrs = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(attrs, dict) or attrs.get("kind") != kind:
        raise StoreError(f"{path} is not {kind}", "choose another run_dir", path=path)
    if attrs.get("schema_version") != version:
        raise StoreError(
            f"{path} has schema version {attrs.get('schema_version')} and this program reads {version}",
            "use the version that wrote it, or choose another run_dir",
            path=path,
        )
    try:
        return zarr.open_group(_zarr_store(path), mode="r+"), unsealed(attrs)
    except (KeyError, ValueError, TypeError) as error:
        raise damaged_metadata(path, "", command) from error


def restore_metadata(path: Path, create: Callable[[Path], object]) -> None:
    """Write those ``zarr.json`` of a group that are missing; what is stored in it stays.

    Args:
        create: makes the same group, without content, at the path it is given.

    Raises:
        StoreError: they cannot be written.
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


def open_array(group: zarr.Group, path: Path, name: str, command: str) -> zarr.Array:
    """One array of the group at `path`. Raises StoreError when it is missing or its metadata are damaged."""
    try:
        array = group[name]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise damaged_metadata(path, name, command) from error
    if not isinstance(array, zarr.Array):  # a flipped bit in its node_type
        raise damaged_metadata(path, name, command)
    return array


def _zarr_store(path: Path) -> Path | FsspecStore:
    if not is_remote(path):
        return path
    from npeff.storage.s3 import S3

    return FsspecStore(S3(asynchronous=True), path=objects.key_of(path))


def damaged_metadata(path: Path, name: str, command: str) -> StoreError:
    """The error whose `path` is the ``zarr.json`` of an array, or, where `name` is empty, of the group at `path`."""
    file = path / name / METADATA
    remedy = f"delete {path} and run `npeff {command} {path.parent}` again"
    return StoreError(f"{file} is damaged", remedy, path=file)


def stored_path(group_path: Path, name: str, array: zarr.Array, index: int) -> Path:
    """The file of the `index`-th shard (chunk, where there are no shards) of an array cut along its first axis only."""
    return group_path / name / array.metadata.encode_chunk_key((index, *[0] * (array.ndim - 1)))


def stored_bytes(path: Path) -> int:
    """Size of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows that make up the `index`-th shard, or chunk, of an array, whole."""

    name: str
    array: zarr.Array
    index: int
    rows: int | slice
    values: np.ndarray


def write_durably(group_path: Path, parts: Iterator[Part]) -> None:
    """Write parts of arrays of a group, so that they survive a power failure.

    Raises:
        StoreError: the disk refuses. Other parts are untouched; this one may be gone.
    """
    if is_remote(group_path):
        objects.put_all(dict(_encoded(group_path, part) for part in parts))
        return
    files, folders = list[Path](), dict[Path, None]()
    for part in parts:
        path = stored_path(group_path, part.name, part.array, part.index)
        with os_errors_explained("write", path):
            for litter in path.parent.glob(f"{path.name}.*{PARTIAL}"):  # of a writer killed inside Zarr
                litter.unlink()
            path.unlink(missing_ok=True)  # Zarr would read a former shard first, and fail on a corrupt one
            part.array[part.rows] = part.values
            files.append(path)
            folders |= dict.fromkeys(each for each in path.parents if each.is_relative_to(group_path))
    with os_errors_explained("write", group_path):
        fsync_all(files)
        fsync_all(folders)


def _encoded(group_path: Path, part: Part) -> tuple[Path, bytes]:
    """The object that a part is stored as.

    Zarr makes it in memory. Through it, a former one would have to be deleted first, and a second worker with the same
    shard would take away what the first has recorded.
    """
    made: dict[str, Buffer] = {}
    in_memory = StorePath(MemoryStore(made), part.name)
    zarr.Array(dataclasses.replace(part.array.async_array, store_path=in_memory))[part.rows] = part.values
    path = stored_path(group_path, part.name, part.array, part.index)
    (content,) = made.values()
    return path, content.to_bytes()
