"""Locks on local files, and one line where the file system has none."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import IO

import pytest
from npeff.runs.errors import RunDirectoryError
from npeff.runs.lock import run_lock
from npeff.storage.errors import StoreError
from npeff.storage.file_lock import lock_file


def test_a_lock_is_held_until_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with open(path, "w") as first, open(path, "w") as second:
        assert lock_file(first, path, wait=False, elsewhere="")
        assert not lock_file(second, path, wait=False, elsewhere="")
        first.close()
        assert lock_file(second, path, wait=True, elsewhere="")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_one_line_that_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(_file: IO[str], _how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    said = rf"^the file system of {tmp_path} does not support locks \({os.strerror(number)}\): mount it with locks "
    with (
        pytest.raises(RunDirectoryError, match=said + ".*or choose a run_dir on another file system"),
        run_lock(tmp_path),
    ):
        pass
    with open(tmp_path / "lock", "w") as file, pytest.raises(StoreError, match=said + ".*or set X$"):
        lock_file(file, tmp_path / "lock", wait=True, elsewhere="set X")
