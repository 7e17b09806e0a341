"""The smaller of B̂B̂ᵀ and B̂ᵀB̂ for sketched rows B̂.

Legend: n rows, D sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from npeff.fisher.second_moments import MomentSum

Blocks = Callable[[], Iterable[Tensor]]
"""Returns sketched rows in order, in blocks (m, D), as often as it is called."""


class SmallerGram(NamedTuple):
    matrix: Tensor
    """B̂B̂ᵀ (n, n) if there are at most D rows, otherwise B̂ᵀB̂ (D, D); float64."""
    by_rows: bool
    """Whether it is B̂B̂ᵀ."""
    n: int


def smaller_gram(rows: Blocks) -> SmallerGram:
    """Compute the matrix in float64: its rounding errors must be small beside a damping."""
    n, dim = 0, 0
    for block_mD in rows():
        n, dim = n + len(block_mD), block_mD.shape[1]
    if n <= dim:
        rows_nD = torch.cat([block_mD.double() for block_mD in rows()])
        return SmallerGram(rows_nD @ rows_nD.T, True, n)
    moments = MomentSum(dim)
    for block_mD in rows():
        moments.add(block_mD.double())
    return SmallerGram(moments.matrix(), False, n)
