"""Results of single fits of a search, each a pair of files, by name:

    <name>.npy    components (K, D) float32
    <name>.json   the record, written after them: what else is known of the fit, their checksum, the signature

A fit without a record, with one of another signature, or with components that do not match it is as good as none: a
search makes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npeff.storage.atomic import write_file_atomically
from npeff.storage.checksums import checksum, read_json, write_json_atomically
from npeff.storage.errors import StoreError
from npeff.storage.location import location

_AGAIN = "run the same command again to make it again"


@dataclass(frozen=True)
class StoredFit:
    components_KD: np.ndarray
    """float32."""
    facts: dict[str, Any]


class FitStore:
    """The folder of one search's fits; it has one writer.

    Args:
        directory: made when the first fit is written.
        signature: hash of everything that a fit of a given name depends on.
    """

    def __init__(self, directory: str | Path, signature: str) -> None:
        self.directory, self.signature = location(directory), signature

    def write(self, name: str, components_KD: np.ndarray, facts: Mapping[str, Any]) -> None:
        """Store a fit, or replace it; `facts` (JSON) are kept in its record.

        Raises:
            StoreError: the disk refuses.
        """
        stored_KD = components_KD.astype(np.float32)
        write_file_atomically(self._components(name), lambda stream: np.save(stream, stored_KD, allow_pickle=False))
        record = {"signature": self.signature, "checksum": checksum({"components": stored_KD}), "facts": dict(facts)}
        write_json_atomically(self._record(name), record)

    def has(self, name: str) -> bool:
        """Whether the fit is there, whole."""
        return self._read(name) is not None

    def read(self, name: str) -> StoredFit:
        """A fit.

        Raises:
            StoreError: it is not there whole.
        """
        found = self._read(name)
        if found is None:
            raise StoreError(f"fit {name} in {self.directory} is gone", _AGAIN, path=self._record(name))
        return found

    def names(self) -> list[str]:
        """Of the fits that have a record, whole or not."""
        return sorted(path.stem for path in self.directory.glob("*.json"))

    def verify(self, name: str) -> None:
        """Read a fit, whatever its signature.

        Raises:
            StoreError: it is not there whole.
        """
        if self._whole(name) is None:
            raise StoreError(f"fit {name} in {self.directory} is damaged", _AGAIN, path=self._record(name))

    def _read(self, name: str) -> StoredFit | None:
        signature, fit = self._whole(name) or (None, None)
        return fit if signature == self.signature else None

    def _whole(self, name: str) -> tuple[str, StoredFit] | None:
        """The signature and the fit; None where it is not there whole."""
        record_path = self._record(name)
        try:
            record = read_json(record_path) if record_path.is_file() else {}
            signature, expected, facts = record["signature"], record["checksum"], dict(record["facts"])
            with self._components(name).open("rb") as stream:
                components_KD: np.ndarray = np.load(stream, allow_pickle=False)
        except (StoreError, OSError, ValueError, EOFError, KeyError, TypeError):
            return None
        if checksum({"components": components_KD}) != expected:
            return None
        return signature, StoredFit(components_KD, facts)

    def _components(self, name: str) -> Path:
        return self.directory / f"{name}.npy"

    def _record(self, name: str) -> Path:
        return self.directory / f"{name}.json"
