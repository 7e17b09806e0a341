"""Conversion of text to paths.

A local path is a `pathlib.Path`. A URI ``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``az://container/prefix`` is a
`BucketPath`, which has the same interface for reading and can be pickled. All writes use `npeff.storage.atomic`, which
supports both.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path, PurePosixPath
from typing import cast

from npeff.storage.bucket_path import BucketPath
from npeff.storage.errors import StoreError

SCHEMES = ("s3", "gs", "az")
"""Schemes of the URIs of Amazon S3 and compatible stores, of Google Cloud Storage, and of Azure Blob Storage."""
_GIVE = "give a local path or a URI s3://bucket/prefix, gs://bucket/prefix or az://container/prefix"


def location(text: str | os.PathLike[str]) -> Path:
    """Return the path of a local file name or a URI such as ``s3://bucket/prefix``.

    ``Path("s3://bucket")`` would be ``s3:/bucket``, so text from a user must be converted by this function. A path is
    returned unchanged.

    Raises:
        StoreError: The URI has another scheme or no prefix in a bucket, or obstore is not installed.
    """
    if not isinstance(text, str):
        return cast(Path, text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in SCHEMES:
        raise StoreError(f"{text} has an unsupported scheme", _GIVE)
    bucket, *prefix = [part for part in rest.split("/") if part not in ("", ".")] or [""]
    if not bucket or not prefix or ".." in prefix:
        raise StoreError(f"{text} is not a folder in a bucket", _GIVE)
    if importlib.util.find_spec("obstore") is None:
        raise StoreError(f"{text} needs obstore, which is not installed", "pip install 'npeff-pipeline[cloud]'")
    return cast(Path, BucketPath(f"{scheme}://{bucket}", PurePosixPath(*prefix)))


def absolute_location(text: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a local file name, with the home directory in place of ``~``, or of a URI.

    Raises:
        StoreError: As in `location`; or the user or the current directory does not exist.
    """
    path = location(text)
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise StoreError(f"{text}: there is no such user, or the user has no home directory", _GIVE) from None
    except FileNotFoundError:
        raise StoreError(f"{text}: the current directory does not exist any more", "change to another one") from None


def is_remote(path: Path) -> bool:
    """Return whether a path is on an object store."""
    return not isinstance(path, Path)
