"""Deletion of a factorization of a run.

On a disk, the folder is renamed first, so that the factorization is complete or absent. On an object store, its
settings are deleted first. A deletion that was interrupted is finished by the same command.
"""

from __future__ import annotations

from pathlib import Path

from npeff.runs import settings
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.storage.atomic import fsync, remove_directory
from npeff.storage.commands import DEFAULT, FACTORIZATIONS
from npeff.storage.location import is_remote
from npeff.store.run_files import check_name


def remove_factorization(run_dir: str | Path, name: str) -> None:
    """Delete a factorization: its components, directions, tables and report. The Fishers stay.

    Args:
        run_dir: The run directory.
        name: The name of the factorization.

    Raises:
        RunDirectoryError: The run has no factorization of this name, is in use, or is of the former layout.
    """
    check_name(name)
    run = RunDirectory.open_any(run_dir)
    remains = run.path / FACTORIZATIONS / f".{name}.deleted"
    left = remains.exists() or (is_remote(run.path) and _remains_on_object_store(run, name))
    if name not in run.factorizations() and not left:
        RunDirectory.open(run.path, name)  # raises for a name that does not exist
        raise RunDirectoryError(f"{run.path} has no factorization {name}")
    with run.lock():
        remove_directory(remains)
        if name in run.factorizations():
            _remove(run.with_factorization(name), remains)
        elif is_remote(run.path):
            remove_directory(run.path / FACTORIZATIONS / name)


def _remains_on_object_store(run: RunDirectory, name: str) -> bool:
    return (run.path / FACTORIZATIONS / name).exists()


def _remove(run: RunDirectory, remains: Path) -> None:
    if run.home == run.path:
        raise RunDirectoryError(
            f"the files of the factorization {run.name} lie in {run.path} itself (the former layout)",
            f"run `npeff migrate {run.path}` first",
        )
    if run.name == DEFAULT and settings.has_former_sections(run.path):
        settings.write_without_former_sections(run)  # else they would define the factorization again
    if is_remote(run.path):
        run.settings.unlink(missing_ok=True)
        remove_directory(run.home)
    else:
        run.home.rename(remains)
        fsync(remains.parent)
        remove_directory(remains)
