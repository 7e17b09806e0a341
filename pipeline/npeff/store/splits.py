"""The split of the examples into fit and held-out examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Splits:
    """Masks (N,) of the valid examples. Each valid example is in exactly one mask."""

    fit_N: NDArray[np.bool_]
    held_out_N: NDArray[np.bool_]
    others_N: NDArray[np.bool_]
    """Valid examples in neither split, because the splits are of some of the examples only."""

    @classmethod
    def of(cls, examples: pa.Table, counts_N: NDArray[np.bool_] | None = None) -> Splits:
        """Return the splits according to the table of examples. Only examples marked in ``counts_N`` are in a split."""
        valid_N = examples["valid"].to_numpy()
        fit_N = is_fit(examples["split"])
        if counts_N is None:
            counts_N = np.ones(len(examples), dtype=bool)
        return cls(valid_N & counts_N & fit_N, valid_N & counts_N & ~fit_N, valid_N & ~counts_N)


def is_fit(split: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Return a mask (N,) of the examples whose split is ``fit``."""
    mask_N: NDArray[np.bool_] = pc.equal(split, "fit").to_numpy()
    return mask_N
