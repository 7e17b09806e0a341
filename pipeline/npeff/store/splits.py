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
    """Valid examples in neither split. With ``mispredicted_only``, examples not known to be mispredicted."""

    @classmethod
    def of(cls, examples: pa.Table, mispredicted_only: bool = False) -> Splits:
        """Return the splits according to the table of examples."""
        valid_N = examples["valid"].to_numpy()
        fit_N = np.asarray(examples["split"].to_pylist()) == "fit"
        counts_N = np.ones(len(examples), dtype=bool)
        if mispredicted_only:
            counts_N = np.array([correct is False for correct in examples["correct"].to_pylist()], dtype=bool)
        return cls(valid_N & counts_N & fit_N, valid_N & counts_N & ~fit_N, valid_N & ~counts_N)
