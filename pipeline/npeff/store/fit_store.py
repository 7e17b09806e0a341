"""Results of the fits of a search. Each fit is a pair of files:

    <name>.npy    components (K, D) float32
    <name>.json   the record, which is written last: other results of the fit, the checksum, the signature

The search repeats a fit if its record is missing or has another signature, or if the components do not match the
checksum.
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

_AGAIN = "run the same command again to recompute it"


@dataclass(frozen=True)
class StoredFit:
    components_KD: np.ndarray
    """float32."""
    facts: dict[str, Any]


class FitStore:
    """The folder with the fits of a search. It has one writer.

    Args:
        directory: The folder, which is created with the first fit.
        signature: Signature of the settings that the fits depend on.
    """

    def __init__(self, directory: str | Path, signature: str) -> None:
        self.directory, self.signature = location(directory), signature

    def write(self, name: str, components_KD: np.ndarray, facts: Mapping[str, Any]) -> None:
        """Write or replace a fit, with `facts` (JSON) in its record.

        Raises:
            StoreError: The fit cannot be written.
        """
        stored_KD = components_KD.astype(np.float32)
        write_file_atomically(self._components(name), lambda stream: np.save(stream, stored_KD, allow_pickle=False))
        record = {"signature": self.signature, "checksum": checksum({"components": stored_KD}), "facts": dict(facts)}
        write_json_atomically(self._record(name), record)

    def has(self, name: str) -> bool:
        """Return whether the fit is complete and intact."""
        return self._read(name) is not None

    def read(self, name: str) -> StoredFit:
        """Read a fit.

        Raises:
            StoreError: The fit is missing or damaged.
        """
        found = self._read(name)
        if found is None:
            raise StoreError(f"fit {name} in {self.directory} is missing or damaged", _AGAIN, path=self._record(name))
        return found

    def names(self) -> list[str]:
        """Return the names of the fits that have a record, intact or damaged."""
        return sorted(path.stem for path in self.directory.glob("*.json"))

    def verify(self, name: str) -> None:
        """Verify a fit with any signature.

        Raises:
            StoreError: The fit is missing or damaged.
        """
        if self._intact(name) is None:
            raise StoreError(f"fit {name} in {self.directory} is damaged", _AGAIN, path=self._record(name))

    def _read(self, name: str) -> StoredFit | None:
        signature, fit = self._intact(name) or (None, None)
        return fit if signature == self.signature else None

    def _intact(self, name: str) -> tuple[str, StoredFit] | None:
        """Return the signature and the fit; None if the fit is missing or damaged."""
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
