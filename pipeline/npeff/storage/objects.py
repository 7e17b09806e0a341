"""The promises of `npeff.storage.atomic`, on an object store.

An object is whole or not there: a PUT, or a multipart upload, becomes visible when it is through. There is no rename,
so a folder cannot be replaced at once. Instead its last file, in the order of `_ordered` (those in folders of it first,
its own after them: ``zarr.json``, ``MANIFEST.json``), says that it is whole: it is the first to go and the last to
come. A reader that goes by it never sees half a folder. A stage's record goes before what it speaks of.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from npeff.storage.errors import ObjectStoreError

if TYPE_CHECKING:
    from npeff.storage.s3 import S3

PART_BYTES = 50 * 2**20
"""Of a multipart upload, which is what becomes of twice that, and more."""
TELLING = "zarr.json"
"""The last file of a Zarr folder."""


def file_system(path: Path) -> S3:
    return cast("S3", cast(Any, path).fs)


def key_of(path: Path) -> str:
    """``bucket/key``, as the file system wants it."""
    return str(cast(Any, path).path)


def put(path: Path, content: bytes) -> None:
    """Create or replace an object."""
    put_all({path: content})


def put_all(contents: Mapping[Path, bytes]) -> None:
    """Create or replace several objects, side by side, in any order."""
    if contents:
        named = {key_of(path): content for path, content in contents.items()}
        file_system(next(iter(contents))).pipe(named, chunksize=PART_BYTES)


def create(path: Path, content: bytes) -> bool:
    """Create an object unless there is one already; whether it was created."""
    try:
        file_system(path).pipe_file(key_of(path), content, mode="create")
    except FileExistsError:
        return False
    return True


def read_range(path: Path, start: int, stop: int) -> bytes:
    """The bytes of an object from `start` to before `stop`."""
    content: bytes = file_system(path).cat_file(key_of(path), start=start, end=stop)
    return content


def download_files(folder: Path, local: Path, names: list[str]) -> None:
    """Copy some objects of a folder to a local one, side by side."""
    if names:
        file_system(folder).get([f"{key_of(folder)}/{name}" for name in names], [str(local / name) for name in names])


def exists(path: Path) -> bool:
    """Whether an object, or a whole Zarr folder, is there."""
    bucket, _, key = key_of(path / TELLING if path.suffix == ".zarr" else path).partition("/")
    try:
        file_system(path).call_s3("head_object", Bucket=bucket, Key=key)
    except FileNotFoundError:
        return False
    return True


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """What S3 says of every object in a folder, at any depth, by its path in there."""
    prefix = key_of(folder) + "/"
    found = file_system(folder).find(key_of(folder), detail=True)
    return {name.removeprefix(prefix): facts for name, facts in found.items() if name.startswith(prefix)}


def remove_directory(folder: Path) -> None:
    prefix = key_of(folder) + "/"
    names = _ordered(files(folder))
    for chosen in ([name for name in names if "/" not in name], [name for name in names if "/" in name]):
        if chosen:
            file_system(folder).rm([prefix + name for name in chosen])


@contextmanager
def replacing_directory(folder: Path) -> Iterator[Path]:
    """The body fills a folder of this machine, which is then put in the place of `folder`."""
    with tempfile.TemporaryDirectory(prefix="npeff-") as temporary:
        local = Path(temporary) / folder.name
        local.mkdir()
        yield local
        upload_directory(local, folder)


def upload_directory(local: Path, folder: Path) -> None:
    """Put the files of a local folder in the place of what is in `folder`."""
    remove_directory(folder)
    names = _ordered(file.relative_to(local).as_posix() for file in local.rglob("*") if file.is_file())
    for chosen in (names[:-1], names[-1:]):
        upload_files(local, folder, chosen)


def upload_files(local: Path, folder: Path, names: list[str]) -> None:
    """Put some files of a local folder, side by side, in any order."""
    if names:
        file_system(folder).put([str(local / name) for name in names], [f"{key_of(folder)}/{name}" for name in names])


def abort_uploads(folder: Path) -> None:
    """Forget multipart uploads that a killed writer left: nobody sees them, but they are paid for.

    Where that is not allowed they stay, for the bucket's lifecycle rules.
    """
    store, (bucket, _, prefix) = file_system(folder), key_of(folder).partition("/")
    with suppress(ObjectStoreError, FileNotFoundError):
        answer = store.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix + "/")
        for upload in answer.get("Uploads", []):
            store.call_s3("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])


def _ordered(names: Any) -> list[str]:
    return sorted(names, key=lambda name: (-name.count("/"), name))
