"""Where the files of a run lie.

    RUN/                        the run and its Fishers: run.yaml, provenance.json, fishers.zarr, shards/, task/, step/
      tables/ stages/ partial/  tables, records and partial results of the stages of the run (`OF_THE_RUN`)
      factorizations/NAME/      one factorization: factorization.yaml, factorization.zarr, checkpoints/,
                                directions.zarr, input_covariance.safetensors, report/, repair/, metrics/,
                                annotations.json
        tables/ stages/ partial/   those of the stages of a factorization

In the former layout, the files of the factorization ``default`` lie in RUN itself. `npeff.runs.migration` moves them.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from npeff.storage import objects
from npeff.storage.commands import DEFAULT, FACTORIZATIONS
from npeff.storage.errors import StoreError
from npeff.storage.location import is_remote
from npeff.store.table_names import OF_THE_RUN, WRITTEN_BY

SETTINGS = "factorization.yaml"
"""The sections of the run file that belong to a factorization. The file marks a folder as a factorization."""

_STAGES = tuple(dict.fromkeys(stage for stage in WRITTEN_BY.values() if stage not in OF_THE_RUN))
"""The stages of a factorization: their records and partial results lie in its folder."""

TABLES = tuple(table for table, stage in WRITTEN_BY.items() if stage not in OF_THE_RUN)

RECORDS = tuple(f"stages/{stage}.json" for stage in reversed(_STAGES))

FILES = (
    *RECORDS,
    "report",
    "repair",
    *(f"partial/{stage}" for stage in _STAGES),
    *(f"tables/{table}.parquet" for table in TABLES),
    "input_covariance.safetensors",
    "directions.zarr",
    "factorization.zarr",
    "checkpoints",
    "metrics",
    "annotations.json",
)
"""The files and folders of a factorization, relative to its folder, without its settings."""

_TRACES = ("factorization.zarr", "checkpoints", "stages/factorize.json", "tables/components.parquet", "directions.zarr")
"""Files of which a factorization that has begun has at least one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_RESERVED = (".partial", ".old")


class FilesOfRun:
    """The paths of the files of a run, with one of its factorizations."""

    path: Path
    """The run directory."""

    @property
    def name(self) -> str:
        """The name of the factorization."""
        raise NotImplementedError

    @property
    def fishers_home(self) -> Path:
        """The run directory with the Fishers: another one if the run uses Fishers of another run."""
        return self.path

    @cached_property
    def home(self) -> Path:
        """The folder of the factorization."""
        return home_of(self.path, self.name)

    @property
    def argument(self) -> str:
        """The run and its factorization as arguments of a command, for messages."""
        return str(self.path) if self.name == DEFAULT else f"{self.path} --factorization {self.name}"

    @property
    def settings(self) -> Path:
        return self.home / SETTINGS

    @property
    def fishers(self) -> Path:
        return self.fishers_home / "fishers.zarr"

    @property
    def diagonal_fisher(self) -> Path:
        return self.fishers_home / "diagonal_fisher.safetensors"

    @property
    def shard_records(self) -> Path:
        return self.fishers_home / "shards"

    @property
    def task_cache(self) -> Path:
        """The files that the task prepares once, such as a trained model or tokenized text."""
        return self.fishers_home / "task"

    @property
    def factorization(self) -> Path:
        return self.home / "factorization.zarr"

    @property
    def checkpoints(self) -> Path:
        return self.home / "checkpoints"

    @property
    def directions(self) -> Path:
        return self.home / "directions.zarr"

    @property
    def input_covariance(self) -> Path:
        """The mean of the inputs and the factor of their covariance, of the stage inputs."""
        return self.home / "input_covariance.safetensors"

    @property
    def annotations(self) -> Path:
        """The names and notes of the components."""
        return self.home / "annotations.json"

    @property
    def metrics(self) -> Path:
        return self.home / "metrics"

    @property
    def report(self) -> Path:
        return self.home / "report" / "index.html"

    @property
    def repaired(self) -> Path:
        """The edited model of the stage repair, and the record of the edits."""
        return self.home / "repair"

    @property
    def stepped(self) -> Path:
        """The edited model of the stage step, and the record of the step."""
        return self.path / "step"

    def folder_of(self, stage: str) -> Path:
        """Return the folder with the tables, the record and the partial results of a stage."""
        return self.path if stage in OF_THE_RUN else self.home

    def table(self, name: str) -> Path:
        """Return the path of a table. The table of examples is that of the factorization if it has its own."""
        if name == "examples" and self.own_examples.is_file():
            return self.own_examples
        return self.folder_of(WRITTEN_BY.get(name, "")) / "tables" / f"{name}.parquet"

    def shared_table(self, name: str) -> Path:
        """Return the path of a table that all factorizations of the run share."""
        return self.path / "tables" / f"{name}.parquet"

    @property
    def own_examples(self) -> Path:
        """The table of examples of a factorization whose held-out examples are not those of the run's table."""
        return self.home / "tables" / "examples.parquet"

    def store(self, stage: str, name: str) -> Path:
        """Return the path of a store that a stage writes."""
        return (self.fishers_home if stage == "fishers" else self.folder_of(stage)) / name

    def partial_results(self, stage: str) -> Path:
        """Results of the finished units of a stage, from which it resumes. They stay after the stage is complete."""
        return self.folder_of(stage) / "partial" / stage

    def record_file(self, stage: str) -> Path:
        """Return the path of the record of a stage, which exists if the stage is complete."""
        return self.folder_of(stage) / "stages" / f"{stage}.json"

    def n_bytes(self) -> int:
        """Return the size in bytes of all files of the factorization."""
        folders = [self.home] if self.home != self.path else [self.path / name for name in FILES]
        return sum(_size(folder) for folder in folders)

    def has_factorization(self) -> bool:
        """Return whether the factorization has begun."""
        return has_begun(self.home)


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    if is_remote(path):
        return sum(int(facts["size"]) for facts in objects.files(path).values())
    total = 0
    for file in path.rglob("*"):
        with suppress(FileNotFoundError):  # a running command has replaced it
            total += file.stat().st_size if file.is_file() else 0
    return total


def home_of(path: Path, name: str) -> Path:
    """Return the folder of a factorization of the run in ``path``: the run itself for ``default`` in the former
    layout."""
    own = path / FACTORIZATIONS / name
    former = name == DEFAULT and not (own / SETTINGS).exists() and has_begun(path)
    return path if former else own


def has_begun(folder: Path) -> bool:
    """Return whether there are results of a factorization in its folder."""
    return any((folder / trace).exists() for trace in _TRACES)


def factorization_names(path: Path) -> list[str]:
    """Return the names of the factorizations of a run: ``default`` first, the others in alphabetic order."""
    folders = (path / FACTORIZATIONS).glob("*")
    names = {folder.name for folder in folders if is_valid_name(folder.name) and (folder / SETTINGS).exists()}
    if DEFAULT not in names and has_begun(home_of(path, DEFAULT)):
        names.add(DEFAULT)
    return sorted(names, key=lambda name: (name != DEFAULT, name))


def chosen_factorization(path: Path, wanted: str | None) -> str:
    """Return the name of the factorization that a command uses.

    Args:
        path: The run directory.
        wanted: A name. The default is ``default``, or the only factorization of the run.

    Raises:
        StoreError: The run has no factorization of this name, or several and none is called ``default``.
    """
    if wanted is None:
        if (path / FACTORIZATIONS / DEFAULT / SETTINGS).exists():
            return DEFAULT
        names = factorization_names(path)
        if len(names) < 2 or DEFAULT in names:
            return names[0] if len(names) == 1 else DEFAULT
        raise StoreError(f"{path} has the factorizations {', '.join(names)}", "choose one with --factorization NAME")
    check_name(wanted)
    if not (path / FACTORIZATIONS / wanted / SETTINGS).exists():
        names = factorization_names(path)
        if wanted not in names and (wanted != DEFAULT or names):
            there = f"it has {', '.join(names)}" if names else "it has no factorization"
            remedy = f"choose one of these, or create it with `npeff factorize {path} --name {wanted}`"
            raise StoreError(f"{path} has no factorization {wanted} ({there})", remedy, path=path)
    return wanted


def is_valid_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and not name.endswith(_RESERVED)


def check_name(name: str) -> None:
    """Check the name of a factorization.

    Raises:
        StoreError: The name is not valid.
    """
    if not is_valid_name(name):
        raise StoreError(
            f"{name!r:.80} cannot be the name of a factorization",
            "use up to 64 letters, digits, dots, hyphens and underscores, beginning with a letter or digit",
        )


def unfinished_migration(path: Path) -> Path:
    """Return the folder, or on an object store the object, that exists while `npeff migrate` moves files."""
    return path / FACTORIZATIONS / f"{DEFAULT}.partial"


def refuse_unfinished_migration(path: Path) -> None:
    """Check that the files of a run are not being moved.

    Raises:
        StoreError: A migration was interrupted.
    """
    if unfinished_migration(path).exists():
        raise StoreError(f"the migration of {path} is not finished", f"run `npeff migrate {path}`", path=path)


def run_and_name(path: Path) -> tuple[Path, str | None]:
    """Return the run directory and the name of a factorization for the path of either.

    ``RUN/factorizations/NAME`` is the path of a factorization. For another path, the name is None.
    """
    if path.parent.name == FACTORIZATIONS and (path / SETTINGS).exists():
        return path.parent.parent, path.name
    return path, None
