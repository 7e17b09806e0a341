"""Migration of a run of the former layout, in which the factorization ``default`` lies in the run directory itself.

The files are moved into ``factorizations/default.partial``, which is then renamed to ``factorizations/default``. On an
object store, they are copied to ``factorizations/default`` while the object ``factorizations/default.partial`` exists,
and then deleted. While a migration is not finished, every other command refuses the run. The same command resumes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from npeff.runs import settings
from npeff.runs.config import FACTORIZATION_SECTIONS
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.lock import run_lock
from npeff.storage import objects
from npeff.storage.atomic import fsync, make_directory, remove_directory
from npeff.storage.commands import DEFAULT
from npeff.storage.errors import StoreError
from npeff.storage.location import absolute_location, is_remote
from npeff.store.run_files import FILES, SETTINGS, home_of, unfinished_migration


def migrate(run_dir: str | Path) -> RunDirectory:
    """Move the files of a run of the former layout to where this version writes them. No result changes.

    Args:
        run_dir: The run directory.

    Returns:
        The run. A run of the present layout is returned unchanged.

    Raises:
        RunDirectoryError: The path is not a run directory, or the run is in use.
        StoreError: A file cannot be moved. The same command resumes the migration.
    """
    path = absolute_location(run_dir)
    if not (path / "run.yaml").exists():
        raise RunDirectoryError(f"no run in {path} (it has no run.yaml: give the directory of a run)")
    with run_lock(path):
        begun = unfinished_migration(path).exists()
        if begun or settings.has_former_sections(path):
            run = RunDirectory(path, settings.stored_config(path, DEFAULT))
            try:
                if begun or home_of(path, DEFAULT) == path:
                    (_copy if is_remote(path) else _move)(run)
                else:  # nothing to move, or killed before the last step
                    _write_settings(run, run.home)
                settings.write_without_former_sections(run)
            except OSError as error:
                reason = error.strerror or str(error)
                raise StoreError(f"cannot move the files of {path}: {reason}", "run the same command again") from error
            if is_remote(path):
                unfinished_migration(path).unlink(missing_ok=True)
    return RunDirectory.open_any(path)


def _move(run: RunDirectory) -> None:
    """Move the files on a disk. Each rename is one step."""
    partial = unfinished_migration(run.path)
    make_directory(partial)
    for name in FILES:
        source, target = run.path / name, partial / name
        if source.exists():
            make_directory(target.parent)
            source.rename(target)
            fsync(target.parent)
            fsync(source.parent)
    _write_settings(run, partial)
    partial.rename(partial.with_name(DEFAULT))
    fsync(partial.parent)


def _copy(run: RunDirectory) -> None:
    """Copy the files on an object store, and then delete the originals."""
    marker = unfinished_migration(run.path)
    target = marker.with_name(DEFAULT)
    if not marker.exists():
        objects.put(marker, b"")
    if not (target / SETTINGS).exists():  # written after all copies
        for name in _stored(run.path):
            objects.put(target / name, (run.path / name).read_bytes())
        _write_settings(run, target)
    for name in FILES:
        source = run.path / name
        if source.suffix in (".json", ".parquet"):
            source.unlink(missing_ok=True)
        else:
            remove_directory(source)


def _stored(path: Path) -> Iterator[str]:
    """Yield the names of the objects of the factorization, with those that mark a folder as complete last."""
    for name in FILES:
        if (path / name).is_file():
            yield name
            continue
        for inner in sorted(objects.files(path / name), key=lambda inner: (-inner.count("/"), inner)):
            yield f"{name}/{inner}"


def _write_settings(run: RunDirectory, folder: Path) -> None:
    if not (folder / SETTINGS).exists():
        run.write(folder / SETTINGS, run.config.to_yaml(FACTORIZATION_SECTIONS))
