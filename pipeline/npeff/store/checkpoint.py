"""Checkpoints of the solver: folders ``<directory>/000120/`` with .npy files and a MANIFEST.json of their checksums.

The driver and its workers write a checkpoint to ``000120.partial``; a worker writes one file. The checkpoint exists
after every byte is durable and the folder is renamed. The newest few checkpoints are kept. If a checkpoint does not
match its manifest, the previous one is used.

An object store cannot rename a folder. There, a checkpoint is written to ``000120-3f9ac21b/``, with a random token in
the name, and exists after its manifest is written, which is the last file. A worker of a killed command, or of an
abandoned group, therefore writes to its own folder, which the next `CheckpointStore.begin` removes.
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
from npeff.storage.checksums import bytes_checksum, file_checksum, read_json, write_json_atomically
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote, location

_MANIFEST = "MANIFEST.json"
_SCHEMA_VERSION = 2
_READABLE = (1, 2)
"""In version 1, a worker wrote one file per shard, which an earlier release expects."""
_FOLDER = re.compile(r"([0-9]{6,})(-[0-9a-f]{8})?")
_ARRAY_NAME = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?")


class _DamagedError(Exception):
    """The files of a checkpoint do not match its manifest."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint."""

    iteration: int
    path: Path
    arrays: dict[str, np.ndarray]
    """The arrays that were given to `CheckpointStore.commit`."""
    names: tuple[str, ...]
    """Names of all arrays, including those that workers wrote, such as "coefficients-00001-of-00004"."""
    warnings: tuple[str, ...]
    """One line for each newer checkpoint that was skipped because it is damaged."""

    def read(self, name: str) -> np.ndarray:
        """Return an array by name. Raises KeyError if there is no such array."""
        if name not in self.names:
            raise KeyError(f"{self.path} has no array {name!r}")
        with os_errors_explained("read", self.path):
            return _load(self.path, name)


class CheckpointStore:
    """The folder with the checkpoints of a run.

    One process begins and commits checkpoints; any number of processes may write their arrays.

    Args:
        directory: The folder.
        keep: Number of newest checkpoints to keep.
        config_hash: Hash of the settings that the checkpoints depend on.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, config_hash: str) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.directory = location(directory)
        self.keep = keep
        self.config_hash = config_hash
        self._begun: dict[int, Path] = {}

    def begin(self, iteration: int) -> Path:
        """Create and return an empty folder for the checkpoint of `iteration`, for `write_checkpoint_array`."""
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
        """Add `arrays` to the arrays written since `begin`, commit the checkpoint, and delete old checkpoints.

        Checkpoints of later iterations are deleted too: they are damaged, and the run resumed from an earlier one.

        Raises:
            StoreError: The checkpoint cannot be written, or `begin` was not called. Earlier checkpoints are unchanged.
        """
        path = self._path(iteration)
        partial = path if is_remote(path) else path.with_name(path.name + PARTIAL)
        own = {name: _npy(name, array) for name, array in arrays.items()}
        _write(partial, own)
        with os_errors_explained("read", partial):
            names = sorted(name.removesuffix(".npy") for name in _files(partial) if name.endswith(".npy"))
            checksums = {
                name: bytes_checksum(own[name]) if name in own else file_checksum(_file(partial, name))
                for name in names
            }
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
        """Return the iterations that have a checkpoint, in ascending order."""
        return [iteration for iteration, _ in self.committed()]

    def latest(self) -> Checkpoint | None:
        """Return the newest intact checkpoint; None if there are no checkpoints.

        Raises:
            StoreError: All checkpoints are damaged, or a checkpoint has another configuration.
        """
        warnings: list[str] = []
        for iteration, path in reversed(self.committed()):
            try:
                names, state_names = self._verify(path)
                arrays = {name: _load(path, name) for name in state_names}
            except (_DamagedError, OSError) as damage:
                warnings.append(f"checkpoint {path} is damaged ({damage}) and skipped")
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
        """Verify one of the `committed` checkpoints.

        Raises:
            StoreError: The checkpoint is damaged or has another configuration.
        """
        try:
            self._verify(path)
        except (_DamagedError, OSError) as damage:
            raise StoreError(
                f"checkpoint {path} is damaged ({damage})", "delete it to resume from the previous one", path=path
            ) from damage

    def _verify(self, path: Path) -> tuple[tuple[str, ...], list[str]]:
        """Return the names of all arrays of a checkpoint, and the names of the arrays given to `commit`."""
        try:
            manifest = read_json(path / _MANIFEST)
            version, config_hash = manifest["schema_version"], manifest["config_hash"]
            checksums, state_names = dict(manifest["checksums"]), list(manifest["arrays"])
        except (StoreError, KeyError, TypeError, ValueError) as error:
            raise _DamagedError(f"{_MANIFEST} is missing or unreadable") from error
        if version not in _READABLE or config_hash != self.config_hash:
            raise StoreError(
                f"checkpoint {path} has another configuration (hash {config_hash}, not {self.config_hash})",
                f"choose another run_dir, or delete {self.directory} to start the stage again",
                path=path,
            )
        for name, expected in checksums.items():
            if file_checksum(_file(path, name)) != expected:
                raise _DamagedError(f"{name} does not match its checksum")
        return tuple(sorted(checksums)), state_names

    def _path(self, iteration: int) -> Path:
        """Return the folder of the checkpoint of `iteration`, which has been begun."""
        return self._begun[iteration] if is_remote(self.directory) else self.directory / f"{iteration:06d}"

    def committed(self) -> list[tuple[int, Path]]:
        """Return the checkpoints, intact or damaged, as (iteration, folder) in ascending order."""
        with os_errors_explained("read", self.directory):
            if is_remote(self.directory):
                folders = self._remote_folders(committed=True)
            else:
                folders = list(self.directory.iterdir()) if self.directory.is_dir() else []
        named = [(match, folder) for folder in folders if (match := _FOLDER.fullmatch(folder.name))]
        return sorted((int(match[1]), folder) for match, folder in named)

    def _remote_folders(self, *, committed: bool) -> list[Path]:
        """Return the folders with a manifest if `committed`, otherwise those without."""
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
            # renamed first, so that a killed process leaves a partial folder and not a damaged checkpoint
            litter = folder.with_name(folder.name + PARTIAL)
            folder.rename(litter)
            shutil.rmtree(litter)


def write_checkpoint_array(folder: Path, name: str, array: np.ndarray) -> None:
    """Write an array to a folder of `CheckpointStore.begin`, from any process with access to it.

    Args:
        folder: The folder of the checkpoint.
        name: Name of the array, with at most one folder: worker 1 of 4 writes "coefficients-00001-of-00004".
        array: The array.

    Raises:
        ValueError: The name has characters other than letters, digits, _ and -, or the array holds objects.
        StoreError: The array cannot be written, or the folder is missing.
    """
    _write(folder, {name: _npy(name, array)})


def _npy(name: str, array: np.ndarray) -> bytes:
    if not _ARRAY_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not a valid array name: letters, digits, _, - and one / are allowed")
    buffer = io.BytesIO()  # np.save to a file would lose the reason for a failed write
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write the files of arrays, on an object store in parallel."""
    if is_remote(folder):
        objects.put_all({_file(folder, name): content for name, content in contents.items()})
        return
    for name, content in contents.items():
        path = _file(folder, name)
        with os_errors_explained("write", path):
            if path.parent != folder:
                path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


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
