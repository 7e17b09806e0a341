"""Checkpoints of the solver: ``<directory>/000120/`` with .npy files and a MANIFEST.json of their checksums.

A checkpoint is filled in ``000120.partial`` by the driver and, with one file per shard, by its workers; it exists once
that folder has been renamed, after every byte was made durable. The newest few are kept; one that does not match its
manifest is passed over for the one before.

On an object store, where a folder cannot be renamed, it is filled in ``000120-3f9ac21b/``, named by a random token, and
exists once its manifest does, which is written last. So a worker of a command that was killed, or of a group that was
given up, writes to a folder of its own, which the next `CheckpointStore.begin` removes.
"""

from __future__ import annotations

import io
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from npeff.storage import objects
from npeff.storage.atomic import OLD, PARTIAL, begin_directory, commit_directory
from npeff.storage.checksums import file_checksum, read_json, write_json_atomically
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote, location

_MANIFEST = "MANIFEST.json"
_SCHEMA_VERSION = 1
_FOLDER = re.compile(r"([0-9]{6,})(-[0-9a-f]{8})?")
_ARRAY_NAME = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?")


class _DamagedError(Exception):
    """A checkpoint's files are not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    iteration: int
    path: Path
    arrays: dict[str, np.ndarray]
    """Those given to `CheckpointStore.commit`."""
    names: tuple[str, ...]
    """Of every array in it, also of those the workers wrote, such as "coefficients/00007"."""
    warnings: tuple[str, ...]
    """One line for each newer checkpoint that was damaged and passed over."""

    def read(self, name: str) -> np.ndarray:
        """One array by its name. Raises KeyError when there is no such array."""
        if name not in self.names:
            raise KeyError(f"{self.path} has no array {name!r}")
        with os_errors_explained("read", self.path):
            return _load(self.path, name)


class CheckpointStore:
    """The folder of one run's checkpoints. One process begins and commits; any number may fill."""

    def __init__(self, directory: str | Path, *, keep: int = 2, config_hash: str) -> None:
        """`keep`: how many of the newest stay; `config_hash`: of everything the checkpoints depend on."""
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = location(directory)
        self.keep = keep
        self.config_hash = config_hash
        self._begun: dict[int, Path] = {}

    def begin(self, iteration: int) -> Path:
        """An empty folder for the checkpoint of `iteration`, to fill by `write_checkpoint_array`."""
        if is_remote(self.directory):
            for folder in self._remote_folders(committed=False):
                objects.remove_directory(folder)
            self._begun = {iteration: self.directory / f"{iteration:06d}-{secrets.token_hex(4)}"}
            return self._begun[iteration]
        with os_errors_explained("write", self.directory):
            for litter in self.directory.glob(f"*{PARTIAL}"):
                shutil.rmtree(litter)
        return begin_directory(self._path(iteration))

    def commit(self, iteration: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Add `arrays` to what was filled since `begin`, make it the newest checkpoint and drop the surplus.

        Checkpoints of later iterations are dropped too: they were damaged and the run fell back behind them.

        Raises:
            StoreError: the disk refuses, or `begin` was not called. Earlier checkpoints are untouched.
        """
        path = self._path(iteration)
        partial = path if is_remote(path) else path.with_name(path.name + PARTIAL)
        for name, array in arrays.items():
            write_checkpoint_array(partial, name, array)
        with os_errors_explained("read", partial):
            names = sorted(name.removesuffix(".npy") for name in _files(partial) if name.endswith(".npy"))
            checksums = {name: file_checksum(_file(partial, name)) for name in names}
        manifest = {
            "schema_version": _SCHEMA_VERSION,
            "iteration": iteration,
            "config_hash": self.config_hash,
            "arrays": sorted(arrays),
            "checksums": checksums,
        }
        write_json_atomically(partial / _MANIFEST, manifest)
        if not is_remote(path):
            commit_directory(path)
        with os_errors_explained("remove old checkpoints from", self.directory):
            self._prune(iteration)

    def iterations(self) -> list[int]:
        """Those that there are checkpoints of, ascending."""
        return [iteration for iteration, _ in self.committed()]

    def latest(self) -> Checkpoint | None:
        """The newest intact checkpoint; None when none was ever committed.

        Raises:
            StoreError: there are checkpoints but all are damaged, or one is of another configuration.
        """
        warnings: list[str] = []
        for iteration, path in reversed(self.committed()):
            try:
                names, state_names = self._verify(path)
                arrays = {name: _load(path, name) for name in state_names}
            except (_DamagedError, OSError) as damage:
                warnings.append(f"checkpoint {path} is damaged ({damage}); passed over for the one before")
                continue
            return Checkpoint(iteration, path, arrays, names, tuple(warnings))
        if warnings:
            raise StoreError(
                f"all checkpoints in {self.directory} are damaged",
                "delete it and run the same command again",
                path=self.directory,
            )
        return None

    def verify(self, path: Path) -> None:
        """Read one of the `committed` checkpoints.

        Raises:
            StoreError: it is damaged, or of another configuration.
        """
        try:
            self._verify(path)
        except (_DamagedError, OSError) as damage:
            raise StoreError(
                f"checkpoint {path} is damaged ({damage})", "delete it, the one before is gone on from", path=path
            ) from damage

    def _verify(self, path: Path) -> tuple[tuple[str, ...], list[str]]:
        """The names of all arrays of a checkpoint, and of those given to `commit`."""
        try:
            manifest = read_json(path / _MANIFEST)
            version, config_hash = manifest["schema_version"], manifest["config_hash"]
            checksums, state_names = dict(manifest["checksums"]), list(manifest["arrays"])
        except (StoreError, KeyError, TypeError, ValueError) as error:
            raise _DamagedError(f"{_MANIFEST} is missing or unreadable") from error
        if version != _SCHEMA_VERSION or config_hash != self.config_hash:
            raise StoreError(
                f"checkpoint {path} is of another configuration (hash {config_hash}, not {self.config_hash})",
                f"choose another run_dir, or delete {self.directory} to start the stage again",
                path=path,
            )
        for name, expected in checksums.items():
            if file_checksum(_file(path, name)) != expected:
                raise _DamagedError(f"{name} does not match its checksum")
        return tuple(sorted(checksums)), state_names

    def _path(self, iteration: int) -> Path:
        """Of the checkpoint that was begun."""
        return self._begun[iteration] if is_remote(self.directory) else self.directory / f"{iteration:06d}"

    def committed(self) -> list[tuple[int, Path]]:
        """The checkpoints, intact or damaged, by iteration, ascending."""
        with os_errors_explained("read", self.directory):
            if is_remote(self.directory):
                folders = self._remote_folders(committed=True)
            else:
                folders = list(self.directory.iterdir()) if self.directory.is_dir() else []
        named = [(match, folder) for folder in folders if (match := _FOLDER.fullmatch(folder.name))]
        return sorted((int(match[1]), folder) for match, folder in named)

    def _remote_folders(self, *, committed: bool) -> list[Path]:
        """Those with a manifest, or those without one."""
        files = [name.split("/", 1) for name in objects.files(self.directory) if "/" in name]
        with_manifest = {folder for folder, file in files if file == _MANIFEST}
        chosen = with_manifest if committed else {folder for folder, _ in files} - with_manifest
        return [self.directory / folder for folder in sorted(chosen)]

    def _prune(self, newest: int) -> None:
        committed, own = self.committed(), self._path(newest)
        before = [path for iteration, path in committed if iteration < newest]
        kept = [own, *before[max(0, len(before) - self.keep + 1) :]]
        surplus = [path for _, path in committed if path not in kept]
        if is_remote(self.directory):
            for folder in surplus:
                objects.remove_directory(folder)
            return
        for folder in [*surplus, *self.directory.glob(f"*{OLD}")]:
            # renamed first, so that a kill in the middle leaves litter and not a checkpoint that looks damaged
            litter = folder.with_name(folder.name + PARTIAL)
            folder.rename(litter)
            shutil.rmtree(litter)


def write_checkpoint_array(folder: Path, name: str, array: np.ndarray) -> None:
    """Write an array into the folder that `CheckpointStore.begin` gave, from any process that sees it.

    `name` may have one folder in front: workers write "coefficients/00007" for shard 7.

    Raises:
        ValueError: the name has other characters than letters, digits, _ and -, or the array holds objects.
        StoreError: the disk refuses, or the folder is gone.
    """
    if not _ARRAY_NAME.fullmatch(name):
        raise ValueError(f"{name!r} cannot name an array: letters, digits, _, - and one / are allowed")
    buffer = io.BytesIO()  # np.save straight to a file loses the reason for a failed write
    np.save(buffer, array, allow_pickle=False)
    path = _file(folder, name)
    with os_errors_explained("write", path):
        if is_remote(path):
            objects.put(path, buffer.getvalue())
            return
        if path.parent != folder:
            path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())


def _files(folder: Path) -> list[str]:
    if is_remote(folder):
        return list(objects.files(folder))
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*")]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _load(folder: Path, name: str) -> np.ndarray:
    with _file(folder, name).open("rb") as stream:
        array: np.ndarray = np.load(stream, allow_pickle=False)
    return array
