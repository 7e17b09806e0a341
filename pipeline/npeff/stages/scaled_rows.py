"""The rows of stored factors, with the scale of the Fishers.

Shapes: n examples of a shard, m rows, R rank, D sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray


def scaled_rows(
    arrays: Mapping[str, NDArray[Any]], used_n: NDArray[np.bool_], scale: float = 1.0
) -> NDArray[np.float32]:
    """Return the rows (m, D) of the used examples of a shard: the factors times the roots of the Fishers' norms.

    Args:
        arrays: ``factors`` (n, R, D), which have norm 1, ``frobenius_norms`` (n,) and ``ranks`` (n,).
        used_n: Marks the used examples.
        scale: The norms are divided by it.
    """
    ranks_n, factors_nRD = arrays["ranks"], arrays["factors"]
    used_nR = used_n[:, None] & (np.arange(factors_nRD.shape[1]) < ranks_n[:, None])
    roots_m = np.sqrt(arrays["frobenius_norms"][used_n] / scale).astype(np.float32).repeat(ranks_n[used_n])
    rows_mD: NDArray[np.float32] = factors_nRD[used_nR]
    rows_mD *= roots_m[:, None]
    return rows_mD
