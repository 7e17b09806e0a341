"""The mean diagonal Fisher of a data set: one safetensors file with one tensor per parameter.

A floating-point sum depends on the order of its terms. The order is therefore fixed and depends only on the number of
shards: a unit is a few consecutive shards, a worker sums the shards of a unit, and the units are added in order. The
finished sums are kept in the folder of partial results, in float64:

    00007.safetensors   the sum over unit 7, written by a worker
    total.safetensors   the sum over all units before the unit in its metadata; the files of these units are deleted

The folder contains only the units that are not yet added to the total. Every file is written atomically.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from npeff.storage.atomic import local_copy
from npeff.storage.errors import StoreError, damaged_file, os_errors_explained
from npeff.storage.location import is_remote
from npeff.storage.objects import read_range
from npeff.store.array_files import arrays_of, write_arrays

_MOST_SHARDS = 4
"""Largest number of shards of a unit. A call of a worker takes the time of a few shards, and a crash costs no more."""
_FEWEST_UNITS = 16
"""Smallest number of units, if there are as many shards, so that many workers can take part."""
_FOLDED_TOGETHER = 16
"""Number of units that are added to the total at a time, so that the total is written less often."""


@dataclass(frozen=True)
class DiagonalSums:
    """Sums of diagonal Fishers in progress. Any number of processes may write units; one process adds them."""

    folder: Path
    n_shards: int
    signature: str
    """Signature of the settings that the shards depend on. Sums with another signature raise an error."""

    @property
    def n_units(self) -> int:
        return -(-self.n_shards // self._unit_size)

    @property
    def _unit_size(self) -> int:
        return max(1, min(_MOST_SHARDS, self.n_shards // _FEWEST_UNITS))

    def shards(self, unit: int) -> tuple[int, ...]:
        """Return the shards of a unit. Raises IndexError outside 0..n_units-1."""
        if not 0 <= unit < self.n_units:
            raise IndexError(f"unit {unit} is outside 0..{self.n_units - 1}")
        first = unit * self._unit_size
        return tuple(range(first, min(first + self._unit_size, self.n_shards)))

    def missing(self) -> list[int]:
        """Return the units that are not yet computed.

        Raises:
            StoreError: A file is damaged or belongs to another run.
        """
        n_folded, waiting = self._n_folded(), self._waiting()
        return [unit for unit in range(n_folded, self.n_units) if unit not in waiting]

    def write(self, unit: int, sums: Mapping[str, np.ndarray]) -> None:
        """Write the sum over the examples of a unit, by parameter.

        Raises:
            StoreError: A number is not finite, or the file cannot be written.
        """
        for name, values in sums.items():
            if not np.isfinite(values).all():
                shards = self.shards(unit)
                raise StoreError(
                    f"the diagonal Fisher of {name} over shards {shards[0]} to {shards[-1]} overflows its precision: "
                    "exclude the parameter (parameters.exclude), or set fishers.diagonal.mean to false"
                )
        write_arrays(self._path(unit), sums, {"signature": self.signature})

    def fold(self, *, last: bool = False) -> None:
        """Add finished units to the total, in order.

        Args:
            last: Add all finished units, even if there are only a few.

        Raises:
            StoreError: A file is damaged, belongs to another run or cannot be written.
        """
        n_folded, waiting = self._n_folded(), self._waiting()
        end = n_folded
        while end in waiting:
            end += 1
        if end - n_folded >= (1 if last else _FOLDED_TOGETHER):
            parts = [self._total] if n_folded else []
            parts += [self._path(unit) for unit in range(n_folded, end)]
            write_arrays(self._total, self._added(parts), {"signature": self.signature, "units": str(end)})
            n_folded = end
        with os_errors_explained("write", self.folder):
            for unit in waiting:
                if unit < n_folded:  # this call, or a call before a crash, has added the unit
                    self._path(unit).unlink()

    def write_mean(self, path: Path, n_examples: int, metadata: Mapping[str, str]) -> None:
        """Write the mean over `n_examples` to `path` in float32, with `metadata`. All units must be folded.

        Raises:
            StoreError: A file is damaged, missing, belongs to another run or cannot be written.
        """
        if (n_folded := self._n_folded()) != self.n_units:
            problem = f"{self.folder} has the sums of {n_folded} of {self.n_units} units"
            raise StoreError(problem, "run the same command again", path=self.folder)
        sums = self._added([self._total])
        mean = {name: (values / max(n_examples, 1)).astype(np.float32) for name, values in sums.items()}
        write_arrays(path, mean, {**metadata, "n_examples": str(n_examples)})

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
        """Return the sum of the files, added in the given order."""
        sums: dict[str, np.ndarray] = {}
        for path in paths:
            with self._opened(path) as file:
                found = arrays_of(file)
                if found is None or (sums and sums.keys() != found.keys()):
                    raise damaged_file(path)  # if the total is deleted, its units are missing and are recomputed
                for name, values in found.items():
                    sums[name] = sums[name] + values if name in sums else values
        return sums

    def _metadata(self, path: Path) -> dict[str, str]:
        if not is_remote(path):
            with self._opened(path) as file:
                return dict(file.metadata())
        metadata: dict[str, str] = _header(path).get("__metadata__", {})  # an object is complete, and may be large
        self._check(path, metadata)
        return metadata

    def _check(self, path: Path, metadata: Mapping[str, str]) -> None:
        if metadata.get("signature") != self.signature:
            raise StoreError(
                f"{path} belongs to another run",
                f"choose another run_dir, or delete {self.folder} to recompute it",
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


def read_traces(path: Path) -> dict[str, float]:
    """Return the sum over each parameter of a mean diagonal Fisher that `DiagonalSums.write_mean` wrote.

    One parameter is in memory at a time. The checksum of the file is not verified: the caller has done so.

    Raises:
        StoreError: The file is missing or damaged.
    """
    try:
        with os_errors_explained("read", path), local_copy(path) as copy, safe_open(copy, "numpy") as file:
            return {name: float(file.get_tensor(name).sum(dtype=np.float64)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise damaged_file(path) from error


def _header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors object: a JSON text after its length in 8 bytes."""
    length = int.from_bytes(read_range(path, 0, 8), "little")
    header: dict[str, Any] = json.loads(read_range(path, 8, 8 + length))
    return header
