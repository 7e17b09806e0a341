"""The mean of the examples' diagonal Fishers, one safetensors file under the parameters' names.

Sums in floating point depend on their order, so the order is fixed, by the number of shards alone: the shards are cut
into units of consecutive ones, a worker adds up a unit, and the units are added one after the other, from the first.
Whatever has been finished stays in the folder of partial results, in float64:

    00007.safetensors   the sum over unit 7, written by a worker
    total.safetensors   the sum over the units before the one that its metadata name, whose own files are gone

Only so many units that wait for their turn lie there, not as many as there are shards. Every file appears by rename.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from npeff.storage.atomic import local_copy, write_file_atomically
from npeff.storage.checksums import checksum
from npeff.storage.errors import StoreError, damaged_file, os_errors_explained
from npeff.storage.location import is_remote
from npeff.storage.objects import read_range

_MOST_SHARDS = 4
"""In one unit: a worker gives it back in time that is counted in shards, and a crash costs no more."""
_FEWEST_UNITS = 16
"""Where there are so many shards, so that many workers have a share."""
_FOLDED_TOGETHER = 16
"""Units that are added to the total at a time: it is written that many times less often than they are."""


@dataclass(frozen=True)
class DiagonalSums:
    """Sums of diagonal Fishers in progress. Any number of processes may write units; one adds them up."""

    folder: Path
    n_shards: int
    signature: str
    """Hash of everything that the shards depend on; sums of another one are refused."""

    @property
    def n_units(self) -> int:
        return -(-self.n_shards // self._unit_size)

    @property
    def _unit_size(self) -> int:
        return max(1, min(_MOST_SHARDS, self.n_shards // _FEWEST_UNITS))

    def shards(self, unit: int) -> tuple[int, ...]:
        """The shards of a unit. Raises IndexError outside 0..n_units-1."""
        if not 0 <= unit < self.n_units:
            raise IndexError(f"unit {unit} is outside 0..{self.n_units - 1}")
        first = unit * self._unit_size
        return tuple(range(first, min(first + self._unit_size, self.n_shards)))

    def missing(self) -> list[int]:
        """Units that have to be computed.

        Raises:
            StoreError: a file is damaged, or of another run.
        """
        n_folded, waiting = self._n_folded(), self._waiting()
        return [unit for unit in range(n_folded, self.n_units) if unit not in waiting]

    def write(self, unit: int, sums: Mapping[str, np.ndarray]) -> None:
        """Keep the sum over a unit's examples, by parameter.

        Raises:
            StoreError: a number is not finite, or the file cannot be written.
        """
        for name, values in sums.items():
            if not np.isfinite(values).all():
                shards = self.shards(unit)
                raise StoreError(
                    f"the diagonal Fisher of {name} over shards {shards[0]} to {shards[-1]} is too large for its "
                    "precision: leave the parameter out (parameters.exclude), or set fishers.diagonal.mean to false"
                )
        _write(self._path(unit), sums, {"signature": self.signature})

    def fold(self, *, last: bool = False) -> None:
        """Add the units that have come, in order, to the total, if there are some; all of them at the `last` time.

        Raises:
            StoreError: a file is damaged or of another run, or cannot be written.
        """
        n_folded, waiting = self._n_folded(), self._waiting()
        end = n_folded
        while end in waiting:
            end += 1
        if end - n_folded >= (1 if last else _FOLDED_TOGETHER):
            parts = [self._total] if n_folded else []
            parts += [self._path(unit) for unit in range(n_folded, end)]
            _write(self._total, self._added(parts), {"signature": self.signature, "units": str(end)})
            n_folded = end
        with os_errors_explained("write", self.folder):
            for unit in waiting:
                if unit < n_folded:  # added now, or before a crash
                    self._path(unit).unlink()

    def write_mean(self, path: Path, n_examples: int, metadata: Mapping[str, str]) -> None:
        """Write the mean over `n_examples` to `path`, float32, with the `metadata`. All units must be folded.

        Raises:
            StoreError: a file is damaged, of another run or missing, or cannot be written.
        """
        if (n_folded := self._n_folded()) != self.n_units:
            problem = f"{self.folder} has the sums of {n_folded} of {self.n_units} units"
            raise StoreError(problem, "run the command again", path=self.folder)
        sums = self._added([self._total])
        mean = {name: (values / max(n_examples, 1)).astype(np.float32) for name, values in sums.items()}
        _write(path, mean, {**metadata, "n_examples": str(n_examples)})

    @property
    def _total(self) -> Path:
        return self.folder / "total.safetensors"

    def _path(self, unit: int) -> Path:
        return self.folder / f"{unit:05d}.safetensors"

    def _waiting(self) -> set[int]:
        with os_errors_explained("read", self.folder):
            entries = list(self.folder.iterdir()) if self.folder.is_dir() else []
        found = {entry: int(entry.stem) for entry in entries if re.fullmatch(r"[0-9]{5,}\.safetensors", entry.name)}
        for path in found:
            self._metadata(path)
        return set(found.values())

    def _n_folded(self) -> int:
        return int(self._metadata(self._total)["units"]) if self._total.exists() else 0

    def _added(self, paths: list[Path]) -> dict[str, np.ndarray]:
        """The sum of the files, from the first to the last."""
        sums: dict[str, np.ndarray] = {}
        for path in paths:
            with self._opened(path) as file:
                found = _read(file)
                if found is None or (sums and sums.keys() != found.keys()):
                    raise damaged_file(path)  # without the total the units that it is of are missing again
                for name, values in found.items():
                    sums[name] = sums[name] + values if name in sums else values
        return sums

    def _metadata(self, path: Path) -> dict[str, str]:
        if not is_remote(path):
            with self._opened(path) as file:
                return dict(file.metadata())
        metadata: dict[str, str] = _header(path).get("__metadata__", {})  # an object is whole, and may be large
        self._check(path, metadata)
        return metadata

    def _check(self, path: Path, metadata: Mapping[str, str]) -> None:
        if metadata.get("signature") != self.signature:
            raise StoreError(
                f"{path} is of another run",
                f"choose another run_dir, or delete {self.folder} to compute it again",
                path=path,
            )

    @contextmanager
    def _opened(self, path: Path) -> Iterator[safe_open]:
        try:
            with os_errors_explained("read", path), local_copy(path) as copy, safe_open(copy, "numpy") as file:
                self._check(path, file.metadata() or {})
                yield file
        except SafetensorError as error:
            raise damaged_file(path) from error


def _header(path: Path) -> dict[str, Any]:
    """Of a safetensors object: a JSON text after 8 bytes that say how long it is."""
    length = int.from_bytes(read_range(path, 0, 8), "little")
    header: dict[str, Any] = json.loads(read_range(path, 8, 8 + length))
    return header


def read_diagonal(path: Path) -> dict[str, np.ndarray]:
    """The numbers of a safetensors file of this module, by parameter.

    Raises:
        StoreError: it is missing or damaged.
    """
    try:
        with os_errors_explained("read", path), local_copy(path) as copy, safe_open(copy, "numpy") as file:
            found = _read(file)
    except SafetensorError:
        found = None
    if found is None:
        raise damaged_file(path)
    return found


def _read(file: safe_open) -> dict[str, np.ndarray] | None:
    """The numbers in a file; None when they are not those that were written."""
    arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    expected = (file.metadata() or {}).get("checksum")
    return arrays if expected in (None, checksum(arrays)) else None


def _write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: 8 bytes of the header's length, the header, the numbers."""
    # what numpy makes of a scalar is no array, and safetensors takes strides for granted
    plain = {name: np.asarray(values, order="C") for name, values in arrays.items()}
    metadata = {**metadata, "checksum": checksum(plain)}
    content = memoryview(save(plain, metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8 : 8 + length]))
    # its metadata come in another order each time, and the same numbers must give the same file
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)

    def write(stream: BinaryIO) -> None:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        stream.write(content[8 + length :])

    write_file_atomically(path, write)
