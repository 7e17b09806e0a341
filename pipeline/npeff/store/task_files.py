"""The files that a task prepares once, such as a trained model or tokenized text.

The files are in ``<run>/task/``, where all workers read them. If the run is on an object store, every machine has a
copy in ``~/.cache/npeff/`` (or ``$XDG_CACHE_HOME/npeff/``). The name of the copy depends on the URI of the run and on
the metadata of the objects, so a copy is never outdated and all workers load the same model. The copy may be deleted.

Only the files that `Task.prepare` writes are shared. Files that a task writes later stay on one machine.
"""

from __future__ import annotations

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
from npeff.storage.file_lock import lock_file
from npeff.storage.location import is_remote

_ELSEWHERE = "set XDG_CACHE_HOME to a folder on another file system"


def task_files(folder: Path) -> Path:
    """Return a local folder with the files of the run's folder ``task/``.

    Raises:
        StoreError: The files cannot be copied to this machine.
    """
    return _local_copy(folder, None) if is_remote(folder) else folder


@contextmanager
def preparing(folder: Path) -> Iterator[Path]:
    """Yield a local folder with the files prepared so far. Files that the body adds are stored in the run.

    Raises:
        StoreError: The files cannot be written.
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
        for name in sorted(changed, key=lambda name: changed[name][1]):  # in the order of the task, in case of a crash
            objects.upload_files(made, folder, [name])
        _local_copy(folder, made)


def _local_copy(folder: Path, made: Path | None) -> Path:
    """Return a local copy of the stored files. If ``made`` is given, it contains these files and becomes the copy."""
    stored = objects.files(folder)
    facts = json.dumps(sorted((name, fact["e_tag"], fact["size"]) for name, fact in stored.items()))
    copy = _cache(folder) / hashlib.sha256(facts.encode()).hexdigest()[:16]
    with os_errors_explained("write", copy):
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open(copy.parent / ".lock", "a", encoding="utf-8") as lock:
            # the workers of a machine start together and share one copy
            lock_file(lock, copy.parent / ".lock", wait=True, elsewhere=_ELSEWHERE)
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
