"""Locks on local files, which the kernel releases when the process ends for any reason."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from npeff.storage.errors import StoreError


def lock_file(file: IO[str], path: Path, *, wait: bool, elsewhere: str) -> bool:
    """Take the exclusive lock of an open file.

    Args:
        file: The file. The lock is held until the file is closed.
        path: The path of the file.
        wait: Whether to wait while another process holds the lock.
        elsewhere: What a user can do to use another folder, for the error message.

    Returns:
        Whether the lock is taken. It is False if another process holds it and ``wait`` is False.

    Raises:
        StoreError: The file system does not support locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # such as ENOSYS on Lustre, and ENOLCK on NFS
        raise StoreError(
            f"the file system of {path.parent} does not support locks ({error.strerror})",
            f"mount it with locks (on Lustre, with the option flock), or {elsewhere}",
            path=path.parent,
        ) from None
    return True
