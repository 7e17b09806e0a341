"""Rows of a non-negative matrix, dense or sparse, and the two products that factorizing it takes.

Shapes: B rows of a block, P columns, K components.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from pipeline.factorization.problem import InvalidProblemError


class Block(Protocol):
    """X (B, P)."""

    dtype: torch.dtype
    device: torch.device

    def times(self, h_KP: Tensor) -> Tensor:
        """H Xᵀ (K, B)."""
        ...

    def weighted_sums(self, w_KB: Tensor) -> Tensor:
        """Wᵀ X (K, P)."""
        ...

    def squares_B(self) -> Tensor:
        """‖x_i‖², float64."""
        ...

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows, dense."""
        ...

    def double(self) -> Block:
        """The same numbers in float64."""
        ...


def block_of(rows_BP: Any) -> Block:
    """The block of a dense tensor or array, or of a SciPy sparse matrix.

    Raises:
        InvalidProblemError: the numbers are not floating-point, not finite, or not non-negative.
    """
    return SparseBlock(rows_BP) if scipy.sparse.issparse(rows_BP) else DenseBlock(torch.as_tensor(rows_BP))


class DenseBlock:
    """Not copied."""

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
        return torch.linalg.vector_norm(self._rows_BP, dim=1, dtype=torch.float64).square()

    def rows(self, indices: Tensor) -> Tensor:
        return self._rows_BP[indices]

    def double(self) -> DenseBlock:
        return DenseBlock(self._rows_BP.double())


class SparseBlock:
    """Stored by columns: of the two factors of a product the small one, of the examples, then stays in the cache, and
    the large one, of the columns, is read once from one end to the other. With rows it is read in leaps, which takes
    five times as long."""

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


def _refuse_negative(values: Tensor) -> None:
    # Every comparison with NaN is false, and so it passes here; it is found by the sums of squares.
    if values.numel() and bool((values < 0).any()):
        raise InvalidProblemError("diagonal Fishers must not have negative entries")
