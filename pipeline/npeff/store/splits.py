"""The split of the examples into fit and held-out examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
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
        fit_N = np.asarray(examples["split"].to_pylist()) == "fit"
        if counts_N is None:
            counts_N = np.ones(len(examples), dtype=bool)
        return cls(valid_N & counts_N & fit_N, valid_N & counts_N & ~fit_N, valid_N & ~counts_N)
