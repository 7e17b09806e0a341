"""Safetensors files of named arrays with a checksum, written atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from npeff.storage.atomic import local_copy, write_file_atomically
from npeff.storage.checksums import checksum
from npeff.storage.errors import damaged_file, os_errors_explained


def read_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a file that `write_arrays` wrote.

    Args:
        path: The file.

    Returns:
        The arrays by name, and the metadata.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        with os_errors_explained("read", path), local_copy(path) as copy, safe_open(copy, "numpy") as file:
            found, metadata = arrays_of(file), dict(file.metadata() or {})
    except SafetensorError:
        found, metadata = None, {}
    if found is None:
        raise damaged_file(path)
    return found, metadata


def is_intact(path: Path) -> bool:
    """Return whether a file that `write_arrays` wrote can be read and matches the checksum in it.

    Raises:
        StoreError: The file is missing.
    """
    try:
        with os_errors_explained("read", path), local_copy(path) as copy, safe_open(copy, "numpy") as file:
            return arrays_of(file) is not None
    except SafetensorError:
        return False


def arrays_of(file: safe_open) -> dict[str, np.ndarray] | None:
    """Return the arrays of an open file; None if they do not match the checksum."""
    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is not a mapping
    expected = (file.metadata() or {}).get("checksum")
    return arrays if expected in (None, checksum(arrays)) else None


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Create or replace a file with named arrays and texts. Equal arguments give files with equal bytes.

    Args:
        path: The file.
        arrays: The arrays by name.
        metadata: Texts by name. The checksum of the arrays is added.
    """
    # numpy operations turn 0-d arrays into scalars, and safetensors ignores strides
    plain = {name: np.asarray(values, order="C") for name, values in arrays.items()}
    metadata = {**metadata, "checksum": checksum(plain)}
    content = memoryview(save(plain, metadata))
    length = int.from_bytes(content[:8], "little")
    # the file is the length of the header in 8 bytes, the header, and the arrays
    header = json.loads(bytes(content[8 : 8 + length]))
    # safetensors writes the metadata in a random order, but equal arrays must give equal files
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)

    def write(stream: BinaryIO) -> None:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        stream.write(content[8 + length :])

    write_file_atomically(path, write)
