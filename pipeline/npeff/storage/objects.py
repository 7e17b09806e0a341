"""The guarantees of `npeff.storage.atomic` on an object store.

An object is complete or absent: a PUT or a multipart upload becomes visible when it is finished. There is no rename, so
a folder cannot be replaced atomically. Instead, the last file of a folder marks the folder as complete
(``zarr.json``, ``MANIFEST.json``; in the order of `_ordered`, files in subfolders come first). The last file is deleted
first and written last, so a reader that checks it never reads an incomplete folder. A stage's record is deleted before
the files that it describes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from npeff.storage.errors import ObjectStoreError

if TYPE_CHECKING:
    from npeff.storage.s3 import S3

PART_BYTES = 50 * 2**20
"""Part size of multipart uploads, which are used for objects of at least twice this size."""
COMPLETION_FILE = "zarr.json"
"""The last file of a Zarr folder, which marks the folder as complete."""


def file_system(path: Path) -> S3:
    """Return the file system of a path on an object store."""
    return cast("S3", cast(Any, path).fs)


def key_of(path: Path) -> str:
    """Return ``bucket/key`` of a path, as the file system expects it."""
    return str(cast(Any, path).path)


def put(path: Path, content: bytes) -> None:
    """Create or replace an object."""
    put_all({path: content})


def put_all(contents: Mapping[Path, bytes]) -> None:
    """Create or replace several objects in parallel, in any order."""
    if contents:
        named = {key_of(path): content for path, content in contents.items()}
        file_system(next(iter(contents))).pipe(named, chunksize=PART_BYTES)


def create(path: Path, content: bytes) -> bool:
    """Create an object unless it exists, and return whether it was created."""
    try:
        file_system(path).pipe_file(key_of(path), content, mode="create")
    except FileExistsError:
        return False
    return True


def read_all(paths: Sequence[Path]) -> list[bytes | None]:
    """Return the content of several objects, in parallel and with one request each; None for a missing object."""
    if not paths:
        return []
    found = file_system(paths[0]).cat([key_of(path) for path in paths], on_error="return")
    contents = [found[key_of(path)] for path in paths] if isinstance(found, dict) else [found]
    for content in contents:
        if isinstance(content, BaseException) and not isinstance(content, FileNotFoundError):
            raise content
    return [None if isinstance(content, BaseException) else content for content in contents]


def read_range(path: Path, start: int, stop: int) -> bytes:
    """Return the bytes of an object from `start` up to, not including, `stop`."""
    content: bytes = file_system(path).cat_file(key_of(path), start=start, end=stop)
    return content


def download_files(folder: Path, local: Path, names: list[str]) -> None:
    """Copy the named objects of a folder to a local folder in parallel."""
    if names:
        file_system(folder).get([f"{key_of(folder)}/{name}" for name in names], [str(local / name) for name in names])


def exists(path: Path) -> bool:
    """Return whether an object, or a complete Zarr folder, exists."""
    bucket, _, key = key_of(path / COMPLETION_FILE if path.suffix == ".zarr" else path).partition("/")
    try:
        file_system(path).call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    return True


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the S3 metadata of every object in a folder, at any depth, by its path relative to the folder."""
    prefix = key_of(folder) + "/"
    found = file_system(folder).find(key_of(folder), detail=True)
    return {name.removeprefix(prefix): facts for name, facts in found.items() if name.startswith(prefix)}


def remove_directory(folder: Path) -> None:
    """Delete all objects of a folder, those that mark it as complete first."""
    prefix = key_of(folder) + "/"
    names = _ordered(files(folder))
    for chosen in ([name for name in names if "/" not in name], [name for name in names if "/" in name]):
        if chosen:
            file_system(folder).rm([prefix + name for name in chosen])


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
    if names:
        file_system(folder).put([str(local / name) for name in names], [f"{key_of(folder)}/{name}" for name in names])


def abort_uploads(folder: Path) -> None:
    """Abort the multipart uploads of a killed writer, which are invisible but billed.

    If the credentials do not allow this, the uploads stay until the bucket's lifecycle rules remove them.
    """
    store, (bucket, _, prefix) = file_system(folder), key_of(folder).partition("/")
    with suppress(ObjectStoreError, FileNotFoundError):
        answer = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix + "/")
        for upload in answer.get("Uploads", []):
            store.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _ordered(names: Any) -> list[str]:
    return sorted(names, key=lambda name: (-name.count("/"), name))
