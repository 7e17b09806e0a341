"""A file system for S3 and compatible object stores, with one-line error messages.

Credentials, region, endpoint and retries come only from the usual environment (``AWS_*``, ``~/.aws``). botocore repeats
requests that were throttled or not answered, with increasing delays, before this module raises an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from io import BytesIO, TextIOWrapper
from typing import IO, Any, Protocol

import aiohttp
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound
from fsspec import AbstractFileSystem
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from upath.implementations.cloud import S3Path as UniversalS3Path
from upath.registry import register_implementation

from npeff.errors import first_line
from npeff.storage.errors import ObjectStoreError

LOCK = ".lock"
"""Name of the lock object of `npeff.storage.object_lock`. Writing this object needs no confirmation by a guard."""

_CHANGES = {
    "put_object",
    "create_multipart_upload",
    "upload_part",
    "complete_multipart_upload",
    "delete_object",
    "delete_objects",
}
_NOT_THERE = {"404", "NoSuchKey"}
_FAILED_CONDITION = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, ProfileNotFound)
_LATER = "finished work is kept; run the same command again later"
_NEW_CREDENTIALS = "set valid ones (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE)"
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
_SENTENCES = {
    "NoSuchBucket": "the bucket does not exist: create it, or choose another run_dir",
    **dict.fromkeys(
        ("AccessDenied", "AllAccessDisabled", "403"),
        "access is denied: allow these credentials to read, write, delete and list there, or choose another run_dir",
    ),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
        f"the credentials are not valid: {_NEW_CREDENTIALS}",
    ),
    **dict.fromkeys(
        ("SlowDown", "ServiceUnavailable", "503", "RequestLimitExceeded", "Throttling", "ThrottlingException"),
        f"the object store is too busy: {_LATER}",
    ),
    **dict.fromkeys(("InternalError", "500", "502", "504"), f"the object store has an internal error: {_LATER}"),
    **dict.fromkeys(
        ("PermanentRedirect", "301", "AuthorizationHeaderMalformed"), f"the bucket is in another region: {_REGION}"
    ),
    **dict.fromkeys(
        ("NotImplemented", "501"), "this object store does not support the request: choose another run_dir"
    ),
    "RequestTimeTooSkewed": "the clock of this machine is wrong: correct it",
}
"""Cause and remedy of each error code of S3, or of the HTTP status of a response without a code."""


class Guard(Protocol):
    async def confirm(self) -> None:
        """Raise ObjectStoreError if this process must not write any more."""
        ...


guards: dict[str, Guard] = {}
"""The guard of each ``bucket/prefix/``, which must confirm every change below this prefix by this process."""


class S3(S3FileSystem):  # type: ignore[misc]  # it has no types
    """s3fs with one-line error messages."""

    def __init__(self, **options: Any) -> None:
        # no listings cache, because other processes write too; no read cache, because Arrow reads no range twice
        super().__init__(**{"use_listings_cache": False, "default_cache_type": "none", **options})

    async def _call_s3(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        place = "/".join(part for part in (keywords.get("Bucket"), _key(keywords)) if part)
        if method in _CHANGES and not place.endswith(f"/{LOCK}"):
            for prefix, guard in list(guards.items()):
                if place.startswith(prefix):
                    await guard.confirm()
        try:
            answer = await super()._call_s3(method, *arguments, **keywords)
        except (OSError, BotoCoreError, ClientError, aiohttp.ClientError) as error:
            raise _explained(error, method, place) from error
        if errors := isinstance(answer, Mapping) and answer.get("Errors"):  # from the deletion of several objects
            raise _sentence(str(errors[0].get("Code")), method, f"{keywords['Bucket']}/{errors[0].get('Key')}", "")
        return answer

    call_s3 = sync_wrapper(_call_s3)

    async def _cat_file(self, path: str, **keywords: Any) -> bytes:
        try:
            # concurrent ranges would first need the size of every object, however small
            content: bytes = await super()._cat_file(path, **{"max_concurrency": 1, **keywords})
        except (BotoCoreError, ClientError, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            raise _explained(error, "get_object", path) from error  # the connection was lost during the response
        return content


class S3Path(UniversalS3Path):
    """A read-only `UPath` that reads each object as a whole. Writes use `npeff.storage.atomic`."""

    __slots__ = ()

    @classmethod
    def _fs_factory(cls, urlpath: str, protocol: str, storage_options: Mapping[str, Any]) -> AbstractFileSystem:
        return S3(**storage_options)

    def open(self, mode: str = "r", *_: Any, encoding: str | None = None, **__: Any) -> IO[Any]:  # type: ignore[override]
        if mode not in ("r", "rb"):
            raise ValueError(f"{self} cannot be opened for writing: use npeff.storage.atomic")
        content = BytesIO(self.read_bytes())
        return content if mode == "rb" else TextIOWrapper(content, encoding=encoding or "utf-8")

    def read_bytes(self) -> bytes:
        content: bytes = self.fs.cat_file(self.path)
        return content

    def unlink(self, missing_ok: bool = False) -> None:
        if not missing_ok and not self.exists():
            raise FileNotFoundError(str(self))
        self.fs.rm_file(self.path)


register_implementation("s3", S3Path, clobber=True)


def _key(keywords: Mapping[str, Any]) -> str | None:
    """Return the key of a request, or the first key of a request with several."""
    key = keywords.get("Key") or keywords.get("Prefix")
    if key is None and "Delete" in keywords:
        key = keywords["Delete"]["Objects"][0]["Key"]
    return key


def _explained(error: Exception, method: str, place: str) -> Exception:
    answer = getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}
    code = str(answer.get("Error", {}).get("Code", "")) if isinstance(answer, Mapping) else ""
    if code in _FAILED_CONDITION:
        return FileExistsError(place)
    if code in _NOT_THERE or (isinstance(error, FileNotFoundError) and not code):
        return error
    if code in ("InvalidRange", "416"):
        return error  # s3fs and zarr handle this error
    if isinstance(error, _NO_CREDENTIALS):
        return ObjectStoreError(f"cannot use s3://{place}: there are no credentials ({error}): {_NEW_CREDENTIALS}")
    if not code and not isinstance(error, ClientError):
        reason = _details(error)
        return ObjectStoreError(
            f"cannot reach s3://{place} ({reason}): check the network and AWS_ENDPOINT_URL; {_LATER}"
        )
    return _sentence(code, method, place, _details(error))


def _sentence(code: str, method: str, place: str, details: str) -> ObjectStoreError:
    meaning = _SENTENCES.get(code)
    if meaning is None:
        meaning = f"{details or 'no details'}; fix this and run the same command again"
    return ObjectStoreError(f"cannot use s3://{place} ({method}: {code}): {meaning}")


def _details(error: BaseException) -> str:
    if isinstance(error, asyncio.TimeoutError):
        return "no answer in time"
    return first_line(error)
