"""The sums over a group of examples in a file, which a worker continues: ``partial/spectrum/group-3.safetensors``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from npeff.fisher.second_moments import MomentSum
from npeff.storage.errors import StoreError
from npeff.store.array_files import read_arrays, write_arrays


@dataclass(frozen=True)
class Totals:
    """Numbers of some examples."""

    n_examples: int = 0
    """Number of valid examples."""
    n_rows: int = 0
    trace: float = 0.0
    """Sum of tr F_i, divided by the scale."""
    squares: float = 0.0
    """Sum of ‖F_i‖_F², divided by the square of the scale."""

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.n_examples + other.n_examples,
            self.n_rows + other.n_rows,
            self.trace + other.trace,
            self.squares + other.squares,
        )


@dataclass
class GroupSums:
    """The sums over the first parts of a group."""

    n_parts: int
    totals: Totals
    moments: MomentSum | None
    rows_nD: NDArray[np.float32] | None


@dataclass(frozen=True)
class GroupFiles:
    """The folder with the files of the groups.

    Args:
        folder: The folder.
        signature: What the sums are made from. A file with another signature raises an error.
        dim: Number of coordinates D.
    """

    folder: Path
    signature: str
    dim: int

    def path(self, group: int) -> Path:
        """Return the file of a group."""
        return self.folder / f"group-{group}.safetensors"

    def read(self, group: int, device: torch.device) -> GroupSums:
        """Read the sums of a group.

        Raises:
            StoreError: The file is missing or damaged, or belongs to other Fishers.
        """
        path = self.path(group)
        arrays, metadata = read_arrays(path)
        if metadata.get("signature") != self.signature:
            raise StoreError(f"{path} belongs to other Fishers", "delete it and run the same command again", path=path)
        counts, sums = arrays["counts"].tolist(), arrays["sums"].tolist()
        moments = MomentSum(self.dim, device, arrays) if "entries" in arrays else None
        return GroupSums(int(metadata["parts"]), Totals(*counts, *sums), moments, arrays.get("rows"))

    def write(self, group: int, sums: GroupSums) -> None:
        """Create or replace the file of a group."""
        totals = sums.totals
        arrays: dict[str, np.ndarray] = {
            "counts": np.array([totals.n_examples, totals.n_rows], np.int64),
            "sums": np.array([totals.trace, totals.squares], np.float64),
        }
        if sums.moments is not None:
            arrays |= sums.moments.arrays()
        if sums.rows_nD is not None:
            arrays["rows"] = sums.rows_nD
        write_arrays(self.path(group), arrays, {"signature": self.signature, "parts": str(sums.n_parts)})

    def n_parts(self, group: int) -> int:
        """Return how many parts of a group are summed. A file that cannot be used is deleted."""
        path = self.path(group)
        if not path.exists():
            return 0
        try:
            return self.read(group, torch.device("cpu")).n_parts
        except StoreError:
            path.unlink()
            return 0
