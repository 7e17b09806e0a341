"""Clients of buckets, with one-line error messages: Amazon S3 and compatible stores, Google Cloud Storage, Azure.

Credentials, region and endpoint come only from the usual environment of each provider. obstore repeats requests that
were throttled or not answered, with increasing delays, before this module raises an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, PreconditionError
from obstore.store import AzureStore, GCSStore, S3Store

from npeff.errors import first_line
from npeff.storage.errors import ObjectStoreError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

RETRIES = 10
"""Number of times that a request is repeated, unless AWS_MAX_ATTEMPTS is set."""
_RETRY_S = 180.0
_TIMEOUT_S = 300.0
"""Longest time of a request in seconds, including the transfer of an object or of a part of it."""
_CONNECT_S = 10.0

_LATER = "finished work is kept; run the same command again later"
_FIX = "fix this and run the same command again"
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN or AZURE_CLIENT_ID",
}
_ENDPOINT = {"s3": "AWS_ENDPOINT_URL", "gs": "GOOGLE_BASE_URL", "az": "AZURE_STORAGE_ACCOUNT_NAME"}
_REGION = "set AWS_DEFAULT_REGION to the bucket's region"
_NO_BUCKET = "the bucket does not exist: create it, or choose another run_dir"
_DENIED = "access is denied: allow these credentials to read, write, delete and list there, or choose another run_dir"
_BUSY = f"the object store is too busy: {_LATER}"
_BROKEN = f"the object store has an internal error: {_LATER}"
_FULL = "the bucket is full or a quota is reached: free some space, or raise the quota, and run the same command again"
_INVALID = "the credentials are not valid: set valid ones"
_SENTENCES = {
    **dict.fromkeys(("NoSuchBucket", "ContainerNotFound"), _NO_BUCKET),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "AuthorizationFailure", "403"), _DENIED),
    **dict.fromkeys(("AuthorizationPermissionMismatch", "InsufficientAccountPermissions"), _DENIED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"), _INVALID),
    **dict.fromkeys(("AuthenticationFailed", "InvalidAuthenticationInfo", "401"), _INVALID),
    **dict.fromkeys(("SlowDown", "ServiceUnavailable", "ServerBusy", "503", "429"), _BUSY),
    **dict.fromkeys(("RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequests"), _BUSY),
    **dict.fromkeys(("InternalError", "500", "502", "504"), _BROKEN),
    **dict.fromkeys(
        ("PermanentRedirect", "301", "AuthorizationHeaderMalformed"), f"the bucket is in another region: {_REGION}"
    ),
    **dict.fromkeys(
        ("NotImplemented", "501"), "this object store does not support the request: choose another run_dir"
    ),
    **dict.fromkeys(("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull", "507"), _FULL),
    "RequestTimeTooSkewed": "the clock of this machine is wrong: correct it",
}
"""Cause and remedy of each error code of a provider, or of the HTTP status of a response without a code."""


class Guard(Protocol):
    def confirm(self) -> None:
        """Raise ObjectStoreError if this process must not write any more."""
        ...


guards: dict[str, Guard] = {}
"""The guard of each folder ``scheme://bucket/prefix/``, which must confirm every change below it by this process."""


def confirm(place: str) -> None:
    """Ask the guards of an object, before it is changed. Raises ObjectStoreError if the lock is lost."""
    for prefix, guard in list(guards.items()):
        if place.startswith(prefix):
            guard.confirm()


@lru_cache(maxsize=64)
def client(root: str) -> ObjectStore:
    """Return the client of a bucket, ``scheme://bucket``.

    Raises:
        ObjectStoreError: There are no credentials, or a setting in the environment is wrong.
    """
    scheme, _, bucket = root.partition("://")
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", "") if scheme == "s3" else ""
    endpoints = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT", "GOOGLE_BASE_URL")
    options: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=_TIMEOUT_S),
            "connect_timeout": timedelta(seconds=_CONNECT_S),
            # only the endpoint that the user has set may be without encryption
            "allow_http": any(os.environ.get(name, "").startswith("http://") for name in endpoints),
        },
        "retry_config": {
            "max_retries": int(attempts) - 1 if attempts.isdigit() else RETRIES,
            "retry_timeout": timedelta(seconds=_RETRY_S),
        },
    }
    make: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[scheme]
    try:
        return cast("ObjectStore", make(bucket, **options, **(_aws(root) if scheme == "s3" else {})))
    except (BaseError, OSError, ValueError) as error:
        raise _without_credentials(root, _details(str(error))) from error


def _aws(root: str) -> dict[str, Any]:
    """Return the credentials for S3 that obstore does not find by itself: those of the files in ``~/.aws``."""
    variables = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE")
    containers = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    if any(os.environ.get(name) for name in (*variables, *containers)):
        return {}
    named = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    files = [Path(os.environ.get(name) or usual).expanduser() for name, usual in named.items()]
    if os.environ.get("AWS_PROFILE") or any(file.is_file() for file in files):
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError:
            if os.environ.get("AWS_PROFILE"):
                raise ObjectStoreError(
                    f"cannot use {root}: AWS_PROFILE needs boto3, which is not installed: "
                    "pip install 'npeff-pipeline[s3]'"
                ) from None
        else:
            try:
                return {"credential_provider": Boto3CredentialProvider()}
            except Exception as error:
                if os.environ.get("AWS_PROFILE"):
                    raise _without_credentials(root, first_line(error)) from error
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        raise _without_credentials(root, "the environment has none")
    return {}  # the role of this machine


def _without_credentials(place: str, details: str) -> ObjectStoreError:
    scheme = place.partition("://")[0]
    return ObjectStoreError(f"cannot use {place}: there are no credentials ({details}): set {_CREDENTIALS[scheme]}")


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Convert the errors of requests in the body for an object or a folder, ``scheme://bucket/key``.

    Raises:
        FileNotFoundError: The object does not exist.
        FileExistsError: The condition of the request does not hold.
        ObjectStoreError: The request failed in another way.
    """
    try:
        yield
    except (BaseError, FileNotFoundError) as error:
        raise converted(error, place) from error
    except OSError as error:
        if error.errno is not None:  # of the local file system
            raise
        raise converted(error, place) from error  # of an upload in parts


def converted(error: Exception, place: str) -> Exception:
    """Return the exception that `explained` raises for an error of obstore."""
    text = str(error)
    code = _code(text)
    if isinstance(error, AlreadyExistsError | PreconditionError):
        return FileExistsError(place)
    if isinstance(error, FileNotFoundError) and code not in _SENTENCES:
        return FileNotFoundError(place)
    scheme = place.partition("://")[0]
    if _NO_CREDENTIALS.search(text):
        return _without_credentials(place, _details(text))
    if code is None and isinstance(error, PermissionDeniedError):
        code = "403"
    if code is None:
        return ObjectStoreError(
            f"cannot reach {place} ({_details(text)}): check the network and {_ENDPOINT[scheme]}; {_LATER}"
        )
    meaning = _SENTENCES.get(code)
    if meaning is None:
        meaning = f"{_details(text) or 'no details'}; {_FIX}"
    elif meaning is _INVALID:
        meaning = f"{meaning} ({_CREDENTIALS[scheme]})"
    return ObjectStoreError(f"cannot use {place} ({code}): {meaning}")


_NO_CREDENTIALS = re.compile(
    r"169\.254\.169\.254|metadata\.google|metadata/identity|credentials? provider|TaskRole", re.I
)
_ERROR_CODE = re.compile(r"<Code>(\w+)</Code>|\"code\": ?\"?(\w+)")
_STATUS = re.compile(r"(?:status code:?|HTTP status|returned)\D{0,40}?([345][0-9]{2})\b")
_MESSAGE = re.compile(r"<Message>(.*?)</Message>|\"message\": ?\"(.*?)\"", re.S)


def _code(text: str) -> str | None:
    """Return the provider's error code in the message of an error, else its HTTP status, else None."""
    if "incorrectly configured region" in text:
        return "PermanentRedirect"
    for pattern in (_ERROR_CODE, _STATUS):
        if (found := pattern.search(text)) is not None:
            return next(group for group in found.groups() if group)
    return None


def _details(text: str) -> str:
    """Return the provider's explanation in the message of an error, else the innermost cause, on one line."""
    if (found := _MESSAGE.search(text)) is not None:
        return " ".join(next(group for group in found.groups() if group is not None).split())
    line = text.partition("\n")[0]
    return line.rpartition(": ")[2] if ": " in line else line


def forget_clients() -> None:
    """Make new clients on next use, for another environment."""
    client.cache_clear()
