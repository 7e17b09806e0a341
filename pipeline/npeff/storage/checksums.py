"""JSON files with checksums, and checksums of arrays and files.

The existence of a shard's files does not mean that the shard is complete: a killed writer leaves some of its arrays. A
shard is complete when its record ``<run>/shards/00007.json`` exists. The record is written after the shard's bytes are
durable, and contains their checksum.
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
"""Key of the checksum of a JSON object's other keys. A flipped bit can leave a JSON file well-formed."""


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum, which `unsealed` verifies. Raises ValueError for NaN and infinity."""
    return {**content, SEAL: json_checksum(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object without its checksum, after verification. An object without a checksum is not verified.

    Raises:
        ValueError: The object does not match its checksum.
    """
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content and content[SEAL] != json_checksum(rest):
        raise ValueError("it does not match its checksum")
    return rest


def json_checksum(content: Mapping[str, Any]) -> str:
    """Return the BLAKE2b hash, in hex, of a JSON object, independent of the order of its keys.

    Raises:
        ValueError: The object cannot be written as JSON.
    """
    read_again = json.loads(json.dumps(content, allow_nan=False))  # turns keys into strings, and tuples into lists
    return hashlib.blake2b(json.dumps(read_again, sort_keys=True).encode(), digest_size=_CHECKSUM_BYTES).hexdigest()


def write_json_atomically(path: Path, obj: Any) -> None:
    """Create or replace a JSON file, with a checksum in objects. Raises ValueError for NaN and infinity."""
    content = json_bytes(obj)
    write_file_atomically(path, lambda stream: stream.write(content))


def json_bytes(obj: Any) -> bytes:
    """Return the content of the file that `write_json_atomically` writes."""
    content = sealed(obj) if isinstance(obj, dict) else obj
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, without its checksum.

    Raises:
        StoreError: The file is missing, unreadable, not JSON, or does not match its checksum.
    """
    with os_errors_explained("read", path):
        content = path.read_bytes()
    try:
        found = json.loads(content)
    except ValueError as error:  # includes UnicodeDecodeError
        raise damaged_file(path, "not JSON") from error
    try:
        return unsealed(found) if isinstance(found, dict) else found
    except ValueError as error:
        raise damaged_file(path, str(error)) from error


def checksum(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the BLAKE2b hash, in hex, of the name, dtype, shape and bytes of all arrays, in the order of the names."""
    digest = hashlib.blake2b(digest_size=_CHECKSUM_BYTES)
    for name in sorted(arrays):
        array = arrays[name]
        if array.dtype.hasobject:
            raise ValueError(f"array {name!r} holds Python objects, which have no stable bytes")
        digest.update(_described(name, array.dtype, array.shape))
        digest.update(_bytes_of(array))
    return digest.hexdigest()


class ChecksumInBlocks:
    """The `checksum` of one array that is given in consecutive blocks of rows."""

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


def bytes_checksum(content: bytes) -> str:
    """Return the `file_checksum` of a file with this content."""
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES).hexdigest()


def file_checksum(path: Path) -> str:
    """Return the BLAKE2b hash of a file's bytes, in hex. Raises OSError."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=_CHECKSUM_BYTES)).hexdigest()
