"""The coordinates of an imported run: selected parameters, or a count sketch of all parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from npeff.interchange.options import ImportOptions
from npeff.interchange.reference_files import BLOCK_VALUES, PefFile
from npeff.runs.progress import ProgressDisplay


class Coordinates(Protocol):
    """A linear map from parameters to D coordinates."""

    @property
    def dim(self) -> int:
        """Number of coordinates D."""

    def place(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the coordinate (int64) and the sign (int8; 0 for a dropped parameter) of each parameter."""

    def to_json(self) -> dict[str, Any]:
        """Return the description of the coordinates in the attributes of the store."""


@dataclass(frozen=True)
class Columns:
    """One coordinate for each selected parameter. The other parameters are dropped."""

    indices_D: np.ndarray
    """Parameter of each coordinate, ascending."""
    n_parameters: int

    @property
    def dim(self) -> int:
        return len(self.indices_D)

    def place(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        coordinates = np.searchsorted(self.indices_D, indices).clip(max=self.dim - 1)
        return coordinates, (self.indices_D[coordinates] == indices).astype(np.int8)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "columns", "indices": self.indices_D.tolist(), "n_parameters": self.n_parameters}


@dataclass(frozen=True)
class CountSketch:
    """A count sketch: parameter i is added to coordinate h(i) with sign s(i), so that E⟨Qx, Qy⟩ = ⟨x, y⟩.

    Both hashes depend only on the seed and i. See Charikar, Chen & Farach-Colton 2002. The hash function is SplitMix64
    (Steele, Lea & Flood 2014), which needs no table.
    """

    dim: int
    seed: int
    n_parameters: int

    def place(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seed = _split_mix_64(np.array([self.seed], dtype=np.uint64))
        hashes = _split_mix_64(indices.astype(np.uint64) ^ seed)
        signs = 1 - 2 * (hashes >> np.uint64(63)).astype(np.int8)
        return (hashes & np.uint64(2**63 - 1)).astype(np.int64) % self.dim, signs

    def to_json(self) -> dict[str, Any]:
        return {"kind": "count", "dim": self.dim, "seed": self.seed, "n_parameters": self.n_parameters}


def kept_parameters(pef: PefFile, min_nonzero: int, progress: ProgressDisplay) -> np.ndarray:
    """Return the parameters with at least `min_nonzero` non-zero entries in the whole file, ascending.

    The memory is proportional to the number of parameters with entries, not to the number that the file states.
    """
    parts = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    with progress.stage("read", pef.header.n_examples, "examples") as tick:
        for block in pef.blocks():
            _, _, indices, values = block.entries()
            parts.append(np.unique(indices[values != 0], return_counts=True))
            if sum(len(found) for found, _ in parts[1:]) > max(len(parts[0][0]), BLOCK_VALUES):
                parts = [_added(parts)]
            tick(block.start + len(block.labels_N))
    found, counts = _added(parts)
    return found[counts >= min_nonzero]


def _added(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct parameters of several lists, ascending, and the sums of their counts."""
    found, places = np.unique(np.concatenate([indices for indices, _ in parts]), return_inverse=True)
    return found, np.bincount(places, weights=np.concatenate([counts for _, counts in parts]), minlength=len(found))


def choose_coordinates(kept_M: np.ndarray, n_parameters: int, options: ImportOptions) -> Coordinates:
    """Return one coordinate per kept parameter, or a count sketch if there are too many."""
    if len(kept_M) <= options.max_dim:
        return Columns(kept_M, n_parameters)
    return CountSketch(options.dim, options.seed, n_parameters)


def parameters_of(sketch: dict[str, Any], dim: int) -> tuple[np.ndarray, int]:
    """Return the parameter of each coordinate of a store in an exported file, and the number of parameters.

    For an imported run with selected parameters, these are the imported parameters. Otherwise, the parameters of the
    file are the coordinates.
    """
    if sketch["kind"] == "columns":
        return np.array(sketch["indices"], dtype=np.int64), sketch["n_parameters"]
    return np.arange(dim), dim


def coordinates_of(sketch: dict[str, Any]) -> Coordinates:
    """Return the coordinates of a description by `Coordinates.to_json`."""
    if sketch["kind"] == "columns":
        return Columns(np.array(sketch["indices"], dtype=np.int64), sketch["n_parameters"])
    return CountSketch(sketch["dim"], sketch["seed"], sketch["n_parameters"])


def _split_mix_64(numbers: np.ndarray) -> np.ndarray:
    """The SplitMix64 finalizer, a bijection of uint64 with pseudorandom bits."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
