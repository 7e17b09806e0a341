"""Sums Σ a aᵀ over rows a in groups, and their eigenvalues for sets of groups.

A group holds its sum as a D×D matrix, or its rows where there are at most D rows in all. Both give the same eigenvalues
besides zeros.

Legend: n rows, D coordinates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy  # imports its subpackages on first use
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

_PANELS = 8
"""Number of blocks of columns of the stored upper triangle."""
_ROWS_AT_ONCE = 1024
"""Number of rows from which their product is added: adding takes time, too."""
Arrays = Mapping[str, NDArray[np.generic]]


class MomentSum:
    """The sum of a aᵀ over rows a: products in the precision of the rows, added up in float64.

    Only the blocks on and above the diagonal are computed.

    Args:
        dim: Number of coordinates D.
        device: Device of the sum.
        arrays: A former sum, as `arrays` returns it. The memory of its arrays is used and changed.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu", arrays: Arrays | None = None) -> None:
        self.dim = dim
        bounds = [dim * panel // _PANELS for panel in range(_PANELS + 1)]
        self._spans = list(itertools.pairwise(bounds))
        if arrays is None:
            size = sum(stop * (stop - start) for start, stop in self._spans)
            self._entries = torch.zeros(size, dtype=torch.float64, device=device)
        else:
            self._entries = torch.from_numpy(np.asarray(arrays["entries"], np.float64)).to(device)
        self._waiting: list[Tensor] = []

    def add(self, rows_nD: Tensor) -> None:
        """Add the products of rows. They may wait for further rows."""
        self._waiting.append(rows_nD)
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self._entries_now()

    def merge(self, other: MomentSum) -> None:
        """Add another sum."""
        self._entries_now().add_(other._entries_now())

    def subtract(self, other: MomentSum) -> None:
        """Subtract a part of this sum."""
        self._entries_now().sub_(other._entries_now())

    def copy(self) -> MomentSum:
        """Return a copy."""
        entries = self._entries_now()
        copied = MomentSum(0)
        copied.dim, copied._spans, copied._entries = self.dim, self._spans, entries.clone()
        return copied

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Return the entries of the sum by name, for a file. On a CPU, they share the memory of the sum."""
        return {"entries": self._entries_now().cpu().numpy()}

    def matrix(self) -> Tensor:
        """Return the sum (D, D)."""
        matrix_DD = torch.empty(self.dim, self.dim, dtype=torch.float64, device=self._entries.device)
        self._entries_now()
        for panel, (start, stop) in zip(self._panels(), self._spans, strict=True):
            matrix_DD[:stop, start:stop] = panel
            matrix_DD[start:stop, :start] = panel[:start].T
        return matrix_DD

    def _entries_now(self) -> Tensor:
        """Return the entries, with the products of all rows."""
        if self._waiting:
            rows_nD = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
            self._waiting = []
            for panel, (start, stop) in zip(self._panels(), self._spans, strict=True):
                panel += rows_nD[:, :stop].T @ rows_nD[:, start:stop]
        return self._entries

    def _panels(self) -> list[Tensor]:
        """Return the blocks of columns of the upper triangle, which share the memory of the entries."""
        sizes = [stop * (stop - start) for start, stop in self._spans]
        parts = zip(self._entries.split(sizes), self._spans, strict=True)
        return [part.view(stop, stop - start) for part, (start, stop) in parts]


class Groups(Protocol):
    """Rows in groups."""

    def eigenvalues(self, chosen: Sequence[int]) -> NDArray[np.float64]:
        """Return the eigenvalues of the sum over the chosen groups, ascending and without some zeros."""
        ...


@dataclass(frozen=True)
class RowGroups:
    """Groups of which all rows are in memory. The eigenvalues are those of the Gram matrix of the rows."""

    rows: Sequence[Tensor]
    """The rows (n, D) of each group."""

    def eigenvalues(self, chosen: Sequence[int]) -> NDArray[np.float64]:
        """See `Groups.eigenvalues`."""
        rows_nD = torch.cat([self.rows[group] for group in chosen]).double()
        gram_nn = rows_nD @ rows_nD.T
        del rows_nD
        return _eigenvalues(gram_nn)


class MomentGroups:
    """Groups whose sums are read one at a time. At most two sums and a matrix are in memory.

    Args:
        n_groups: Number of groups.
        read: Returns the sum of a group, which is not changed.
    """

    def __init__(self, n_groups: int, read: Callable[[int], MomentSum]) -> None:
        self._n_groups, self._read = n_groups, read
        self._total: MomentSum | None = None

    def eigenvalues(self, chosen: Sequence[int]) -> NDArray[np.float64]:
        """See `Groups.eigenvalues`."""
        left_out = sorted(set(range(self._n_groups)) - set(chosen))
        return _eigenvalues(self._matrix(chosen, left_out))

    def _matrix(self, chosen: Sequence[int], left_out: Sequence[int]) -> Tensor:
        if len(left_out) > 1:
            self._total = None
            return self._sum(chosen).matrix()
        if self._total is None:
            self._total = self._sum(range(self._n_groups))
        if not left_out:
            return self._total.matrix()
        removed = self._read(left_out[0])  # before the copy, because reading takes the memory of two sums
        moments = self._total.copy()
        moments.subtract(removed)
        del removed
        return moments.matrix()

    def _sum(self, chosen: Sequence[int]) -> MomentSum:
        moments = self._read(chosen[0]).copy()
        for group in chosen[1:]:
            moments.merge(self._read(group))
        return moments


def _eigenvalues(matrix_nn: Tensor) -> NDArray[np.float64]:
    """Return the eigenvalues of a symmetric matrix, whose memory is used for the computation."""
    if matrix_nn.device.type == "cpu":  # torch and numpy copy the matrix, and torch takes a third longer
        columns_nn = matrix_nn.numpy().T
        # scipy's BLAS does not know torch's number of threads, and its threads spin while they wait
        with threadpool_limits(torch.get_num_threads(), user_api="blas"):
            found_n: NDArray[np.float64] = scipy.linalg.eigvalsh(
                columns_nn, overwrite_a=True, check_finite=False, driver="ev"
            )
    else:
        found_n = torch.linalg.eigvalsh(matrix_nn).cpu().numpy()
    return found_n
