"""A part of a run directory that can be verified by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from npeff.runs.definition import StageDefinition, Summary, finished
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.stage import checked_record, unit_checksums, unit_files
from npeff.storage.atomic import remove_directory
from npeff.storage.checksums import file_checksum
from npeff.storage.errors import StoreError
from npeff.storage.zarr_groups import METADATA
from npeff.store.tables import read_table


@dataclass(frozen=True)
class Part:
    """A part of a run directory that is verified independently of the other parts."""

    what: str
    where: Path
    verify: Callable[[], object]
    """Raises StoreError or RunDirectoryError if the part is damaged."""
    deleted: tuple[Path, ...] = ()
    """Files and folders to delete before a stage recomputes the part: the part and its records."""
    recomputable: bool = True
    remedy: str = ""
    """What the user can do if the part is not recomputable."""


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        remove_directory(path)
    else:
        path.unlink(missing_ok=True)


def metadata_parts(group: Path, error: StoreError, record: Path) -> Iterator[Part]:
    """Yield the damaged ``zarr.json`` of a store that cannot be opened.

    The content of the store can be verified only after this file is restored.
    """
    named = error.path or group
    files = (named,) if named.name == METADATA else ()

    def verify() -> None:
        raise error

    deleted, recomputable = (*files, record), bool(files)
    yield Part(f"metadata of {group.name}", named, verify, deleted, recomputable=recomputable, remedy=error.remedy)


def unit_parts(run: RunDirectory, stage: StageDefinition, what: str, unit: str = "component") -> Iterator[Part]:
    """Yield the results of each finished unit of a stage that works by components, or by other numbered units."""
    for component in finished_units(run, stage.name):
        files = unit_files(run, stage, component, intact_record(run, stage.name))
        verify, deleted = partial(_verify_unit, run, stage, component), (*files.values(), run.record_file(stage.record))
        yield Part(f"{what} of {unit} {component}", deleted[0], verify, deleted)


def _verify_unit(run: RunDirectory, stage: StageDefinition, component: int) -> None:
    record = intact_record(run, stage.name)
    for name, path in unit_files(run, stage, component, record).items():
        read_table(path, name)
    for name, found in unit_checksums(run, stage, [component], record).items():
        if record is not None and found != record.get("units", {}).get(name, found):
            raise StoreError(f"result {component} of {stage.name} does not match its checksum")


def finished_units(run: RunDirectory, stage: str) -> list[int]:
    """Return the units that a stage has finished, according to its result files and its record."""
    record = intact_record(run, stage) or {}
    return sorted({*finished(run.partial_results(stage)), *record.get("components", range(record.get("n_blocks", 0)))})


def verify_table(path: Path, checksum: str | None) -> None:
    """Read a table, and compare the file with its checksum if there is one."""
    read_table(path, path.stem)
    if checksum is not None and file_checksum(path) != checksum:
        raise StoreError(f"{path} does not match its checksum", path=path)


def missing(path: Path) -> None:
    """Raise the StoreError of a missing file."""
    raise StoreError(f"{path} is missing", path=path)


def intact_record(run: RunDirectory, stage: str) -> Summary | None:
    """Return the record of a complete stage; None if the record is missing or damaged."""
    try:
        return checked_record(run, stage)
    except RunDirectoryError:
        return None
