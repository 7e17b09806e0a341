"""Sketches of the directions that a run stores, in the space of the stored Fisher factors.

Legend: K components, D sketch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from npeff.storage.commands import run_argument
from npeff.storage.errors import StoreError
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore


class FilesOfDirections(Protocol):
    """The files of a run, such as `npeff.runs.directory.RunDirectory`."""

    @property
    def directions(self) -> Path: ...

    @property
    def factorization(self) -> Path: ...


def direction_sketches(files: FilesOfDirections) -> NDArray[np.float64]:
    """Return the unit sketches (K, D), float64, of the stored directions.

    Products with the stored normalized factors, Â_i · sketch, estimate those of the factors with the directions in all
    parameters. The sketch of an own direction is close to the component h_j, and that of a whitened direction to the
    combination Σ_l C_jl h_l. The rows of components without a direction are NaN, and that of an unused component is
    zero. A run of an earlier version stores no sketches; its directions are own directions, so the result is H.

    Args:
        files: The files of the run.

    Raises:
        StoreError: A store is missing or damaged, or an earlier version stored directions of diagonals.
    """
    stored_KD = DirectionStore.open(files.directions).read_sketches()
    if stored_KD is None:
        factorization = open_factorization(files.factorization)
        if factorization.attrs.get("factorized", "fishers").startswith("diagonal_"):
            remedy = f"delete it and run `npeff lift {run_argument(files.directions)}` again"
            raise StoreError(f"{files.directions} has no sketches of directions", remedy, path=files.directions)
        stored_KD = factorization.read_components()
    sketches_KD = stored_KD.astype(np.float64)
    lengths_K = np.linalg.norm(sketches_KD, axis=1, keepdims=True)
    np.divide(sketches_KD, lengths_K, out=sketches_KD, where=lengths_K > 0)
    return sketches_KD
