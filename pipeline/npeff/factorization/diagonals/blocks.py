"""Blocks of rows of a non-negative matrix, dense or sparse, and the two products that the factorization needs.

Shapes: N examples, k entries of each, B rows of a block, P columns, K components.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from npeff.factorization.problem import InvalidProblemError


class Block(Protocol):
    """A block X (B, P)."""

    dtype: torch.dtype
    device: torch.device

    def times(self, h_KP: Tensor) -> Tensor:
        """Return H Xᵀ (K, B)."""
        ...

    def weighted_sums(self, w_KB: Tensor) -> Tensor:
        """Return W X (K, P), where W is (K, B)."""
        ...

    def squares_B(self) -> Tensor:
        """Return ‖x_i‖² (B,), float64."""
        ...

    def rows(self, indices: Tensor) -> Tensor:
        """Return the given rows, dense."""
        ...

    def double(self) -> Block:
        """Return the block in float64."""
        ...


def block_of(rows_BP: Any) -> Block:
    """Return the block of a dense tensor or array, or of a SciPy sparse matrix.

    Raises:
        InvalidProblemError: if the numbers are not floating-point numbers, or one is negative.
    """
    return SparseBlock(rows_BP) if scipy.sparse.issparse(rows_BP) else DenseBlock(torch.as_tensor(rows_BP))


class DenseBlock:
    """A dense block, which is not copied."""

    def __init__(self, rows_BP: Tensor) -> None:
        if not rows_BP.is_floating_point():
            raise InvalidProblemError(f"diagonal Fishers must be floating-point numbers, not {rows_BP.dtype}")
        _refuse_negative(rows_BP)
        self._rows_BP = rows_BP
        self.dtype, self.device = rows_BP.dtype, rows_BP.device

    def times(self, h_KP: Tensor) -> Tensor:
        return h_KP @ self._rows_BP.T

    def weighted_sums(self, w_KB: Tensor) -> Tensor:
        return w_KB @ self._rows_BP

    def squares_B(self) -> Tensor:
        result: Tensor = torch.linalg.vector_norm(self._rows_BP, dim=1, dtype=torch.float64).square()
        return result

    def rows(self, indices: Tensor) -> Tensor:
        return self._rows_BP[indices]

    def double(self) -> DenseBlock:
        return DenseBlock(self._rows_BP.double())


class SparseBlock:
    """A sparse block, stored by columns.

    The small factor of each product, which is indexed by examples, then stays in the cache, and the large factor, which
    is indexed by columns, is read sequentially. Storage by rows reads the large factor in random order, which takes
    five times as long.
    """

    device = torch.device("cpu")

    def __init__(self, rows_BP: Any) -> None:
        self._columns = scipy.sparse.csc_array(rows_BP)
        values = torch.from_numpy(self._columns.data)
        if not values.is_floating_point():
            raise InvalidProblemError(f"diagonal Fishers must be floating-point numbers, not {values.dtype}")
        _refuse_negative(values)
        self.dtype = values.dtype

    def times(self, h_KP: Tensor) -> Tensor:
        return torch.from_numpy(self._columns @ h_KP.T.contiguous().numpy()).T.contiguous()

    def weighted_sums(self, w_KB: Tensor) -> Tensor:
        return torch.from_numpy(self._columns.T @ w_KB.T.contiguous().numpy()).T

    def squares_B(self) -> Tensor:
        return torch.from_numpy(np.asarray(self._columns.astype(np.float64).power(2).sum(axis=1)))

    def rows(self, indices: Tensor) -> Tensor:
        return torch.from_numpy(self._columns[indices.numpy()].toarray())

    def double(self) -> SparseBlock:
        return SparseBlock(self._columns.astype(np.float64))


def entries_by_column(
    values_Nk: np.ndarray, indices_Nk: np.ndarray, columns_P: np.ndarray
) -> tuple[scipy.sparse.csr_array, Tensor]:
    """Build a sparse matrix from the largest entries of each example.

    Args:
        values_Nk: the entries; zero where an example has fewer entries.
        indices_Nk: the indices of the entries in the diagonal.
        columns_P: the index in the diagonal of each column of the matrix, ascending.

    Returns:
        The matrix (N, P), and the sum of squares (N,) of the entries that are in no column.
    """
    places_Nk = np.searchsorted(columns_P, indices_Nk)
    inside_Nk = np.append(columns_P, -1)[places_Nk] == indices_Nk
    outside_N = np.square(values_Nk.astype(np.float64) * ~inside_Nk).sum(axis=1)
    inside_Nk &= values_Nk > 0
    starts = np.concatenate([[0], inside_Nk.sum(axis=1).cumsum()])
    shape = (len(values_Nk), len(columns_P))
    rows_NP = scipy.sparse.csr_array((values_Nk[inside_Nk], places_Nk[inside_Nk], starts), shape=shape)
    return rows_NP, torch.from_numpy(outside_N)


def _refuse_negative(values: Tensor) -> None:
    # NaN passes this check, because every comparison with NaN is false. The sums of squares detect NaN.
    if values.numel() and bool((values < 0).any()):
        raise InvalidProblemError("diagonal Fishers must not have negative entries")
