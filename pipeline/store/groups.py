"""Zarr groups that say what they are: a kind and a schema version in their attributes, and errors of one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr

from pipeline.store.atomic import PARTIAL, fsync, write_file_atomically
from pipeline.store.errors import StoreError, os_errors_explained
from pipeline.store.manifest import SEAL, read_json, sealed, unsealed

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
        exists = path.is_dir()
    if not exists:
        raise StoreError(f"{path} does not exist: run `npeff {command} {path.parent}` first")
    try:
        metadata = read_json(path / METADATA)
    except StoreError as error:
        raise StoreError(_damaged(path / "zarr.json", path, command)) from error
    attrs = metadata.get("attributes") if isinstance(metadata, dict) else None
    if not isinstance(attrs, dict) or attrs.get("kind") != kind:
        raise StoreError(f"{path} is not {kind}: choose another run_dir")
    if attrs.get("schema_version") != version:
        raise StoreError(
            f"{path} has schema version {attrs.get('schema_version')} and this program reads {version}: "
            "use the version that wrote it, or choose another run_dir"
        )
    try:
        return zarr.open_group(path, mode="r+"), unsealed(attrs)
    except (KeyError, ValueError, TypeError) as error:
        raise StoreError(_damaged(path / "zarr.json", path, command)) from error


def restore_metadata(path: Path, create: Callable[[Path], object]) -> None:
    """Write those ``zarr.json`` of a group that are missing; what is stored in it stays.

    Args:
        create: makes the same group, without content, at the path it is given.

    Raises:
        StoreError: they cannot be written.
    """
    fresh = path.with_name(f"{path.name}.metadata")
    with os_errors_explained("write", path):
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            create(fresh)
            for source in sorted(fresh.rglob(METADATA)):
                target = path / source.relative_to(fresh)
                if not target.exists():
                    write_file_atomically(target, partial(_copy, source))
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _copy(source: Path, stream: BinaryIO) -> None:
    stream.write(source.read_bytes())


def open_array(group: zarr.Group, path: Path, name: str, command: str) -> zarr.Array:
    """One array of the group at `path`. Raises StoreError when it is missing or its metadata are damaged."""
    try:
        array = group[name]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise StoreError(_damaged(path / name / METADATA, path, command)) from error
    if not isinstance(array, zarr.Array):  # a flipped bit in its node_type
        raise StoreError(_damaged(path / name / METADATA, path, command))
    return array


def damaged_metadata(path: Path, name: str, command: str) -> StoreError:
    """That of an array, or, where `name` is empty, of the group at `path`."""
    return StoreError(_damaged(path / name / METADATA, path, command))


def _damaged(what: Path, group_path: Path, command: str) -> str:
    return f"{what} is damaged: delete {group_path} and run `npeff {command} {group_path.parent}` again"


def stored_path(group_path: Path, name: str, array: zarr.Array, index: int) -> Path:
    """The file of the `index`-th shard (chunk, where there are no shards) of an array cut along its first axis only."""
    return group_path / name / array.metadata.encode_chunk_key((index, *[0] * (array.ndim - 1)))


def write_durably(
    group_path: Path, name: str, array: zarr.Array, index: int, rows: int | slice, values: np.ndarray
) -> None:
    """Write the rows that make up the `index`-th shard or chunk, whole, so that they survive a power failure.

    Raises:
        StoreError: the disk refuses. Other shards are untouched; this one may be gone.
    """
    path = stored_path(group_path, name, array, index)
    with os_errors_explained("write", path):
        for litter in path.parent.glob(f"{path.name}.*{PARTIAL}"):  # of a writer killed inside Zarr
            litter.unlink()
        path.unlink(missing_ok=True)  # Zarr would read a former shard first, and fail on a corrupt one
        array[rows] = values
        for entry in (path, *path.parents):
            fsync(entry)
            if entry == group_path:
                break
