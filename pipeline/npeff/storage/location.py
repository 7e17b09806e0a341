"""Where things are stored: the one place that makes a path from text.

A path is a `pathlib.Path` for a local file system, and for ``s3://bucket/prefix`` a `UPath`, which has the same
interface, pickles, and reads. Everything is written through `npeff.storage.atomic`, which knows both.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import cast

from npeff.storage.errors import StoreError


def location(text: str | os.PathLike[str]) -> Path:
    """The path that ``text`` names: a local one, or a URI ``s3://bucket/prefix``.

    ``Path("s3://bucket")`` would become ``s3:/bucket``: text that a user wrote goes through here first. A path is
    returned as it is.

    Raises:
        StoreError: the URI is of another kind, names no prefix in a bucket, or s3fs is not installed.
    """
    if not isinstance(text, str):
        return cast(Path, text)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme != "s3":
        raise StoreError(f"{text} cannot be used", "give a local path or a URI s3://bucket/prefix")
    bucket, *prefix = [part for part in rest.split("/") if part not in ("", ".")] or [""]
    if not bucket or not prefix or ".." in prefix:
        raise StoreError(f"{text} names no folder of a bucket", "give a URI s3://bucket/prefix")
    if importlib.util.find_spec("s3fs") is None:
        raise StoreError(f"{text} needs s3fs, which is not installed", "pip install 'npeff-pipeline[s3]'")
    from npeff.storage.s3 import S3Path

    return cast(Path, S3Path(f"s3://{'/'.join([bucket, *prefix])}"))


def is_remote(path: Path) -> bool:
    """Whether a path is on an object store."""
    return not isinstance(path, Path)
