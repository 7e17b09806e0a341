"""The coordinates of an imported run: kept parameters, or a count sketch of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from npeff.interchange.options import ImportOptions


class Coordinates(Protocol):
    """A linear map from parameters to D coordinates."""

    @property
    def dim(self) -> int:
        """D."""

    def place(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each parameter's coordinate (int64), and the sign it goes there with (int8; 0 where it is dropped)."""

    def to_json(self) -> dict[str, Any]:
        """What the store keeps of it."""


@dataclass(frozen=True)
class Columns:
    """One coordinate for each of some parameters; the others are dropped."""

    indices_D: np.ndarray
    """Ascending."""
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
    """Parameter i goes to coordinate h(i) with sign s(i), both hashes of the seed and i alone: E⟨Qx, Qy⟩ = ⟨x, y⟩.

    Charikar, Chen & Farach-Colton 2002; the hash is SplitMix64's (Steele, Lea & Flood 2014), so that no table is kept.
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


def choose_coordinates(kept_M: np.ndarray, n_parameters: int, options: ImportOptions) -> Coordinates:
    """Every kept parameter is a coordinate, unless they are too many."""
    if len(kept_M) <= options.max_dim:
        return Columns(kept_M, n_parameters)
    return CountSketch(options.dim, options.seed, n_parameters)


def parameters_of(sketch: dict[str, Any], dim: int) -> tuple[np.ndarray, int]:
    """Which parameter of a file each coordinate of a store is, and how many a file has: of an imported run those it was
    imported with, otherwise the coordinates themselves."""
    if sketch["kind"] == "columns":
        return np.array(sketch["indices"], dtype=np.int64), sketch["n_parameters"]
    return np.arange(dim), dim


def coordinates_of(sketch: dict[str, Any]) -> Coordinates:
    """The inverse of `Coordinates.to_json`."""
    if sketch["kind"] == "columns":
        return Columns(np.array(sketch["indices"], dtype=np.int64), sketch["n_parameters"])
    return CountSketch(sketch["dim"], sketch["seed"], sketch["n_parameters"])


def _split_mix_64(numbers: np.ndarray) -> np.ndarray:
    """The SplitMix64 finalizer, a bijection of uint64 whose bits look random."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
