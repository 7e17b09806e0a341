"""Access to coefficients (N, K) in blocks, without a copy of the whole array.

Legend: N examples, K components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 32 * 2**20
"""Approximate size in bytes of a block of coefficients in float32."""


class Coefficients(Protocol):
    """A numpy array, or an object that returns a block as a numpy array when it is sliced along both axes."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, block: tuple[slice, slice], /) -> NDArray[np.floating]: ...


class StackedRows:
    """Arrays (n, K) stacked along the first axis. They are concatenated only for a requested block."""

    def __init__(self, parts: Sequence[NDArray[np.float32]]) -> None:
        self._parts = list(parts)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).tolist()
        self.shape = (self._starts[-1], parts[0].shape[1])

    def __getitem__(self, block: tuple[slice, slice], /) -> NDArray[np.float32]:
        rows, columns = block
        first, last, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError("the step of a slice of rows must be 1")
        bounds = zip(self._starts, self._parts, strict=False)
        cut = [part[max(first - start, 0) : max(last - start, 0), columns] for start, part in bounds]
        return np.concatenate(cut)


def blocks_of_rows(coefficients_NK: Coefficients, rows: int) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Yield blocks of ``rows`` rows in float32, each with its slice."""
    n_examples = coefficients_NK.shape[0]
    for start in range(0, n_examples, rows):
        block = slice(start, min(start + rows, n_examples))
        yield block, coefficients_NK[block, slice(None)].astype(np.float32, copy=False)


def columns_of(coefficients_NK: Coefficients) -> Iterator[NDArray[np.float64]]:
    """Yield the coefficients (N,) of component 0, 1, ..., with 0 in place of NaN.

    Neighbouring columns share cache lines, so several columns are copied at a time.
    """
    n_examples, n_components = coefficients_NK.shape
    width = max(1, BLOCK_BYTES // (4 * n_examples))
    for first in range(0, n_components, width):
        block_NJ = coefficients_NK[slice(None), slice(first, min(first + width, n_components))]
        for column_N in np.ascontiguousarray(block_NJ.T):
            yield np.nan_to_num(column_N.astype(np.float64))
