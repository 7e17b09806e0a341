"""JSON files, checksums of arrays, and the completion records that say which shards are done.

Presence of a shard's files does not mean completion: a killed writer leaves some of a shard's arrays. A shard is
complete when its record ``<run>/shards/00007.json`` exists; the record is written after the shard's bytes are durable,
and holds their checksum.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store.atomic import write_file_atomically
from pipeline.store.errors import StoreError, os_errors_explained
from pipeline.store.location import is_remote, location
from pipeline.store.objects import create

_CHECKSUM_BYTES = 16


SEAL = "seal"
"""Key under which a JSON object carries the checksum of the rest of it: a flipped bit may leave it well-formed."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its seal, which `unsealed` verifies. NaN and infinity are refused (ValueError)."""
    return {**content, SEAL: json_checksum(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What was sealed; an object without a seal as it is. Raises ValueError when it is not what was sealed."""
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != json_checksum(rest):
        raise ValueError("it does not match its seal")
    return rest


def json_checksum(content: Mapping[str, Any]) -> str:
    """BLAKE2b, in hex, of a JSON object, whatever the order of its keys. Raises ValueError where it is not JSON."""
    read_again = json.loads(json.dumps(content, allow_nan=False))  # keys are strings then, tuples are lists
    return hashlib.blake2b(json.dumps(read_again, sort_keys=True).encode(), digest_size=_CHECKSUM_BYTES).hexdigest()


def write_json_atomically(path: Path, obj: Any) -> None:
    """Create or replace a JSON file; objects are sealed. NaN and infinity are no JSON and refused (ValueError)."""
    content = _json(obj)
    write_file_atomically(path, lambda stream: stream.write(content))


def _json(obj: Any) -> bytes:
    content = sealed(obj) if isinstance(obj, dict) else obj
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The content of a JSON file, without its seal.

    Raises:
        StoreError: the file is missing, unreadable, not JSON, or not what was sealed.
    """
    with os_errors_explained("read", path):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except ValueError as error:  # of which UnicodeDecodeError is a kind
        raise StoreError(f"{path} is damaged (not JSON): delete it and run the same command again") from error
    try:
        return unsealed(found) if isinstance(found, dict) else found
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}): delete it and run the same command again") from error


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """BLAKE2b, in hex, over the name, dtype, shape and bytes of every array, in the order of the names."""
    digest = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for name in sorted(arrays):
        array = arrays[name]
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which have no stable bytes")
        digest.update(_described(name, array.dtype, array.shape))
        digest.update(_bytes_of(array))
    return digest.hexdigest()


class ChecksumInBlocks:
    """`checksum` of one array, which is given in blocks of rows, in order."""

    def __init__(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self._dtype = dtype
        self._digest = hashlib.blake2b(_described(name, dtype, shape), digest_size=_CHECKSUM_BYTES)

    def update(self, block: np.ndarray) -> None:
        assert block.dtype == self._dtype
        self._digest.update(_bytes_of(block))

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _described(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    return json.dumps([name, dtype.str, shape]).encode()


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def file_checksum(path: Path) -> str:
    """BLAKE2b of a file's bytes, in hex. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=_CHECKSUM_BYTES)).hexdigest()


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
        the second's must be equal.

        Raises:
            StoreError: it is not, or the record cannot be written.
        """
        if record.signature != self.signature:
            raise ValueError(f"record of signature {record.signature!r} among records of {self.signature!r}")
        path = record_path(self.directory, record.shard)
        if not is_remote(path):
            write_json_atomically(path, asdict(record))
        elif not create(path, _json(asdict(record))) and (first := self._read(path).checksum) != record.checksum:
            raise StoreError(
                f"shard {record.shard} was computed twice with different results, of checksum {first} and "
                f"{record.checksum}: delete {path} and run the same command again"
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
            raise StoreError(f"{path} is not a completion record: delete it and run the same command again")
        record = CompletionRecord(**content)
        if record.signature != self.signature:
            raise StoreError(
                f"{path} is of another run (signature {record.signature}, not {self.signature}): "
                "choose another run_dir, or delete this one to compute its Fishers again"
            )
        return record
