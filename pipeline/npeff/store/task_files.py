"""What a task prepares once, a trained network or tokenised text: files, which tasks read and write with any library.

On a local disk they are in ``<run>/task/``, for all workers. Those of a run on an object store are there too, and every
machine has a copy in ``~/.cache/npeff/`` (or ``$XDG_CACHE_HOME/npeff/``), named by the run's URI and by what the object
store says of the files: so a copy is never an old one, and all workers load the same model. It may be deleted.

Only what `Task.prepare` leaves behind is shared. What a task writes later stays on the machine that it runs on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npeff.storage import objects
from npeff.storage.atomic import PARTIAL
from npeff.storage.errors import os_errors_explained
from npeff.storage.location import is_remote


def task_files(folder: Path) -> Path:
    """Where on this machine the files in the run's folder ``task/`` can be read.

    Raises:
        StoreError: they cannot be copied here.
    """
    return _local_copy(folder, None) if is_remote(folder) else folder


@contextmanager
def preparing(folder: Path) -> Iterator[Path]:
    """A local folder with what was prepared so far; what the body adds to it is stored in the run.

    Raises:
        StoreError: the files cannot be written.
    """
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    before = task_files(folder)
    with tempfile.TemporaryDirectory(dir=_cache(folder)) as temporary:
        with os_errors_explained("write", _cache(folder)):
            made = Path(shutil.copytree(before, Path(temporary, "task")))
        stamps = _stamps(made)
        yield made
        changed = {name: stamp for name, stamp in _stamps(made).items() if stamps.get(name) != stamp}
        for name in sorted(changed, key=lambda name: changed[name][1]):  # in the task's order, for a crash in between
            objects.upload_files(made, folder, [name])
        _local_copy(folder, made)


def _local_copy(folder: Path, made: Path | None) -> Path:
    """The copy of what is stored now; ``made`` is that already, where it is given, and becomes the copy."""
    stored = objects.files(folder)
    facts = json.dumps(sorted((name, fact.get("ETag"), fact["size"]) for name, fact in stored.items()))
    copy = _cache(folder) / hashlib.sha256(facts.encode()).hexdigest()[:16]
    with os_errors_explained("write", copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open(copy.parent / ".lock", "a", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # this machine's workers begin together, and one copy is enough
            if not copy.is_dir():
                partial = made or copy.with_name(copy.name + PARTIAL)
                if made is None:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir()
                    for name in stored:
                        Path(partial, name).parent.mkdir(parents=True, exist_ok=True)
                    objects.download_files(folder, partial, list(stored))
                partial.rename(copy)
    return copy


def _cache(folder: Path) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "npeff" / hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    files = {file: file.stat() for file in folder.rglob("*") if file.is_file()}
    return {file.relative_to(folder).as_posix(): (stat.st_size, stat.st_mtime_ns) for file, stat in files.items()}
