"""Completion records of shards: one record with a checksum for each complete shard."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType

from npeff.storage.checksums import json_bytes, read_json, write_json_atomically
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote, location
from npeff.storage.objects import create, files

_RECORDS_AT_ONCE = 16
"""Number of records that are read at a time from an object store."""


ShardChecksums = str | Mapping[str, str]
"""The checksum of all arrays of a shard together, or of each array by name."""


@dataclass(frozen=True)
class CompletionRecord:
    """The record of a shard whose arrays are completely stored."""

    shard: int
    start: int
    """First example."""
    stop: int
    """One past the last example."""
    checksum: str
    """Checksum of the stored arrays, as returned by `FisherStore.write_shard`."""
    n_invalid: int
    """Number of examples that were left out because their logits or gradients were not finite."""
    seconds: float
    """Wall-clock time of the computation of the shard, in seconds."""
    signature: str
    """Signature of the settings that the content of the shard depends on."""
    array_checksums: dict[str, str] | None = None
    """Checksum of each array, so that some arrays can be verified without the others; None in earlier records."""

    @property
    def checksums(self) -> ShardChecksums:
        """The checksums with which the shard is read."""
        return self.array_checksums or self.checksum


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "shard": (int,), "start": (int,), "stop": (int,), "checksum": (str,),
    "n_invalid": (int,), "seconds": (int, float), "signature": (str,), "array_checksums": (dict, NoneType),
}  # fmt: skip


def record_path(directory: Path, shard: int) -> Path:
    """Return the path of the completion record of a shard in the folder of records."""
    return directory / f"{shard:05d}.json"


class ShardRecords:
    """The folder of completion records of one run's shards."""

    def __init__(self, directory: str | Path, signature: str) -> None:
        """`signature`: of the settings that the shards depend on. Records with another signature raise an error."""
        self.directory = location(directory)
        self.signature = signature

    def complete(self) -> dict[int, CompletionRecord]:
        """Return the existing records by shard number, in ascending order.

        Raises:
            StoreError: A record is damaged or has another signature.
        """
        with os_errors_explained("read", self.directory):
            if is_remote(self.directory):
                entries = [self.directory / name for name in files(self.directory)]
            else:
                entries = list(self.directory.iterdir()) if self.directory.is_dir() else []
        paths = [path for path in entries if re.fullmatch(r"[0-9]{5,}\.json", path.name)]
        paths.sort(key=lambda path: int(path.stem))
        with ThreadPoolExecutor(_RECORDS_AT_ONCE if is_remote(self.directory) else 1, "records") as threads:
            records = list(threads.map(self._read, paths))
        return {int(path.stem): record for path, record in zip(paths, records, strict=True)}

    def read(self, shard: int) -> CompletionRecord:
        """Return the record of one shard.

        Raises:
            StoreError: The record is missing, is damaged or has another signature.
        """
        return self._read(record_path(self.directory, shard))

    def write(self, record: CompletionRecord) -> None:
        """Record a shard as complete. Its arrays must already be durable (`FisherStore.write_shard` has returned).

        On an object store, two workers may compute the same shard if one of them was considered lost. The first worker
        writes the record, and the checksum of the second must be equal. It is equal on processors of the same type,
        because the batches of a shard have the same shapes.

        Raises:
            StoreError: The checksums are not equal, or the record cannot be written.
            ValueError: The record has another signature.
        """
        if record.signature != self.signature:
            raise ValueError(f"record of signature {record.signature!r} among records of {self.signature!r}")
        path = record_path(self.directory, record.shard)
        if not is_remote(path):
            write_json_atomically(path, asdict(record))
        elif not create(path, json_bytes(asdict(record))) and (first := self._read(path).checksum) != record.checksum:
            raise StoreError(
                f"shard {record.shard} was computed twice with different results (checksums {first} and "
                f"{record.checksum})",
                f"delete {path} and run the same command again",
                path=path,
            )

    def withdraw(self, shards: Iterable[int]) -> None:
        """Delete the records of shards before they are recomputed, on an object store, where existing records stay."""
        for path in (record_path(self.directory, shard) for shard in shards):
            if is_remote(path):
                path.unlink(missing_ok=True)

    def _read(self, path: Path) -> CompletionRecord:
        content = read_json(path)
        well_formed = (
            isinstance(content, dict)
            and set(content) | {"array_checksums"} == {field.name for field in fields(CompletionRecord)}
            and all(isinstance(content.get(name), types) for name, types in _FIELD_TYPES.items())
            and record_path(self.directory, content["shard"]) == path
        )
        if not well_formed:
            remedy = "delete it and run the same command again"
            raise StoreError(f"{path} is not a completion record", remedy, path=path)
        record = CompletionRecord(**content)
        if record.signature != self.signature:
            raise StoreError(
                f"{path} belongs to another run (signature {record.signature}, not {self.signature})",
                "choose another run_dir",
                path=path,
            )
        return record
