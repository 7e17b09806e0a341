"""The one exception of this package, and the one place where the operating system's errors become sentences."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class StoreError(Exception):
    """Something on disk is missing, damaged, foreign or cannot be written.

    The message is one line that names the path and says what to do about it.
    """


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
        reason = error.strerror or str(error).partition("\n")[0]
        advice = _ADVICE.get(error.errno or 0, "mend this and run the same command again")
        raise StoreError(f"cannot {action} {path}: {reason}; {advice}") from error
