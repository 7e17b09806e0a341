"""Conversion of text to paths.

A local path is a `pathlib.Path`. A URI ``s3://bucket/prefix`` is a `UPath`, which has the same interface, can be
pickled, and can be read. All writes use `npeff.storage.atomic`, which supports both.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import cast

from npeff.storage.errors import StoreError


def location(text: str | os.PathLike[str]) -> Path:
    """Return the path of a local file name or a URI ``s3://bucket/prefix``.

    ``Path("s3://bucket")`` would be ``s3:/bucket``, so text from a user must be converted by this function. A path is
    returned unchanged.

    Raises:
        StoreError: The URI has another scheme or no prefix in a bucket, or s3fs is not installed.
    """
    if not isinstance(text, str):
        return cast(Path, text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme != "s3":
        raise StoreError(f"{text} has an unsupported scheme", "give a local path or a URI s3://bucket/prefix")
    bucket, *prefix = [part for part in rest.split("/") if part not in ("", ".")] or [""]
    if not bucket or not prefix or ".." in prefix:
        raise StoreError(f"{text} is not a folder in a bucket", "give a URI s3://bucket/prefix")
    if importlib.util.find_spec("s3fs") is None:
        raise StoreError(f"{text} needs s3fs, which is not installed", "pip install 'npeff-pipeline[s3]'")
    from npeff.storage.s3 import S3Path

    return cast(Path, S3Path(f"s3://{'/'.join([bucket, *prefix])}"))


def is_remote(path: Path) -> bool:
    """Return whether a path is on an object store."""
    return not isinstance(path, Path)
