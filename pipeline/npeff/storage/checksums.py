"""JSON files, checksums of arrays, and the completion records that say which shards are done.

Presence of a shard's files does not mean completion: a killed writer leaves some of a shard's arrays. A shard is
complete when its record ``<run>/shards/00007.json`` exists; the record is written after the shard's bytes are durable,
and holds their checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npeff.storage.atomic import write_file_atomically
from npeff.storage.errors import damaged_file, os_errors_explained

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
    content = json_bytes(obj)
    write_file_atomically(path, lambda stream: stream.write(content))


def json_bytes(obj: Any) -> bytes:
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
        raise damaged_file(path, "not JSON") from error
    try:
        return unsealed(found) if isinstance(found, dict) else found
    except ValueError as error:
        raise damaged_file(path, str(error)) from error


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
