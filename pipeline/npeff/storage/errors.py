"""The exceptions of the stores, and the conversion of operating system errors to error messages."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npeff.errors import NpeffError, first_line


class StoreError(NpeffError):
    """A file or folder, `path`, is missing, damaged, belongs to something else, or cannot be written."""


class ObjectStoreError(NpeffError):
    """A request that an object store refused or did not answer.

    This is not a StoreError, because a failed request does not mean that stored data are damaged.
    """


def damaged_file(path: Path, details: str = "") -> StoreError:
    """Return the error for a damaged file that the same command writes again after the file is deleted."""
    found = f" ({details})" if details else ""
    return StoreError(f"{path} is damaged{found}", "delete it and run the same command again", path=path)


_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of the quota and run the same command again",
    errno.EFBIG: "raise the limit (ulimit -f), or choose a run_dir on another file system",
    errno.EACCES: "change its permissions or choose another run_dir",
    errno.EPERM: "change its permissions or choose another run_dir",
    errno.EROFS: "choose a run_dir on a writable file system",
}


@contextmanager
def os_errors_explained(action: str, path: Path) -> Iterator[None]:
    """Convert an `OSError` of the body to ``StoreError("cannot <action> <path>: <reason>; <advice>")``."""
    try:
        yield
    except OSError as error:
        gone = os.strerror(errno.ENOENT) if isinstance(error, FileNotFoundError) else None
        reason = error.strerror or gone or first_line(error)
        advice = _ADVICE.get(error.errno or 0, "fix this and run the same command again")
        raise StoreError(f"cannot {action} {path}: {reason}", advice, path=path, separator="; ") from error
