"""The exceptions of this package, and the one place where the operating system's errors become sentences."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npeff.errors import NpeffError, first_line


class StoreError(NpeffError):
    """Something on disk is missing, damaged, foreign or cannot be written; `path` says which file or folder."""


class ObjectStoreError(NpeffError):
    """A request that an object store refused or did not answer, in one line that says what to do.

    It is no StoreError: it says nothing of what is stored, and must not be taken for damage.
    """


def damaged_file(path: Path, details: str = "") -> StoreError:
    """The error for a damaged file that the same command writes again once it is deleted."""
    found = f" ({details})" if details else ""
    return StoreError(f"{path} is damaged{found}", "delete it and run the same command again", path=path)


_ADVICE = {
    errno.ENOSPC: "free some space and run the same command again",
    errno.EDQUOT: "free some of the quota and run the same command again",
    errno.EACCES: "make it writable or choose another run_dir",
    errno.EPERM: "make it writable or choose another run_dir",
    errno.EROFS: "choose a run_dir on a writable file system",
}


@contextmanager
def os_errors_explained(action: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` of the body into ``StoreError("cannot <action> <path>: <reason>; <advice>")``."""
    try:
        yield
    except OSError as error:
        gone = os.strerror(errno.ENOENT) if isinstance(error, FileNotFoundError) else None
        reason = error.strerror or gone or first_line(error)
        advice = _ADVICE.get(error.errno or 0, "mend this and run the same command again")
        raise StoreError(f"cannot {action} {path}: {reason}", advice, path=path, separator="; ") from error
