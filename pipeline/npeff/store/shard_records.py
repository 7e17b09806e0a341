"""Which shards are complete: one record with a checksum for each."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from npeff.storage.checksums import json_bytes, read_json, write_json_atomically
from npeff.storage.errors import StoreError, os_errors_explained
from npeff.storage.location import is_remote, location
from npeff.storage.objects import create


@dataclass(frozen=True)
class CompletionRecord:
    """Says that one shard's arrays are on disk, whole."""

    shard: int
    start: int
    """First example."""
    stop: int
    """One past the last example."""
    checksum: str
    """Of the stored arrays, as returned by `FisherStore.write_shard`."""
    n_invalid: int
    """Examples left out because their logits or gradients were not finite."""
    seconds: float
    """Wall-clock time it took to compute the shard."""
    signature: str
    """Hash of everything the shard's content depends on."""


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "shard": (int,), "start": (int,), "stop": (int,), "checksum": (str,),
    "n_invalid": (int,), "seconds": (int, float), "signature": (str,),
}  # fmt: skip


def record_path(directory: Path, shard: int) -> Path:
    """Where the completion record of a shard lies in the folder of records."""
    return directory / f"{shard:05d}.json"


class ShardRecords:
    """The folder of completion records of one run's shards."""

    def __init__(self, directory: str | Path, signature: str) -> None:
        """`signature`: hash of everything a shard of this run depends on; records of another one are refused."""
        self.directory = location(directory)
        self.signature = signature

    def complete(self) -> dict[int, CompletionRecord]:
        """The records there are, by shard, in ascending order.

        Raises:
            StoreError: a record is damaged, or is of another signature.
        """
        with os_errors_explained("read", self.directory):
            entries = list(self.directory.iterdir()) if self.directory.is_dir() else []
        paths = [path for path in entries if re.fullmatch(r"[0-9]{5,}\.json", path.name)]
        return {int(path.stem): self._read(path) for path in sorted(paths, key=lambda path: int(path.stem))}

    def read(self, shard: int) -> CompletionRecord:
        """The record of one shard.

        Raises:
            StoreError: it is missing, damaged, or of another signature.
        """
        return self._read(record_path(self.directory, shard))

    def write(self, record: CompletionRecord) -> None:
        """Record a shard as complete. Its arrays must be durable already (`FisherStore.write_shard` returned).

        On an object store two workers may come to the same shard, where one was thought lost: the first records it, and
        the second's must be equal, as it is on processors of one type: the batches of a shard have the same shapes.

        Raises:
            StoreError: it is not, or the record cannot be written.
        """
        if record.signature != self.signature:
            raise ValueError(f"record of signature {record.signature!r} among records of {self.signature!r}")
        path = record_path(self.directory, record.shard)
        if not is_remote(path):
            write_json_atomically(path, asdict(record))
        elif not create(path, json_bytes(asdict(record))) and (first := self._read(path).checksum) != record.checksum:
            raise StoreError(
                f"shard {record.shard} was computed twice with different results, of checksum {first} and "
                f"{record.checksum}",
                f"delete {path} and run the same command again",
                path=path,
            )

    def withdraw(self, shards: Iterable[int]) -> None:
        """Before shards that are complete are computed again: on an object store the first record of a shard stands."""
        for path in (record_path(self.directory, shard) for shard in shards):
            if is_remote(path):
                path.unlink(missing_ok=True)

    def _read(self, path: Path) -> CompletionRecord:
        content = read_json(path)
        well_formed = (
            isinstance(content, dict)
            and set(content) == {field.name for field in fields(CompletionRecord)}
            and all(isinstance(content[name], types) for name, types in _FIELD_TYPES.items())
            and record_path(self.directory, content["shard"]) == path
        )
        if not well_formed:
            remedy = "delete it and run the same command again"
            raise StoreError(f"{path} is not a completion record", remedy, path=path)
        record = CompletionRecord(**content)
        if record.signature != self.signature:
            raise StoreError(
                f"{path} is of another run (signature {record.signature}, not {self.signature})",
                "choose another run_dir, or delete this one to compute its Fishers again",
                path=path,
            )
        return record
