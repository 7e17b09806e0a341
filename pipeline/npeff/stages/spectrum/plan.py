"""Which examples each group has, and what is computed of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

N_GROUPS = 8
"""Number of groups of examples, each of which the jackknife leaves out once."""

ALL = tuple(range(N_GROUPS))

SETS: tuple[tuple[int, ...], ...] = (
    *(tuple(group for group in range(N_GROUPS) if group != left_out) for left_out in range(N_GROUPS)),
    tuple(range(N_GROUPS // 4)),
    tuple(range(N_GROUPS // 2)),
)
"""The groups of each set besides all: those of the jackknife, a quarter and a half of the examples."""

_PIECES = 32
"""Smallest number of pieces, so that groups have about as many examples."""
_LARGEST = 8192
"""Largest order of a matrix whose eigenvalues are computed."""
_MOST_BYTES = 2**31
"""Largest size in bytes of rows that are held in memory."""
_PRODUCTS = 2**40
"""Largest number of products of a call of a worker."""

Kind = Literal["matrix", "rows", "traces"]


@dataclass(frozen=True)
class Piece:
    """The examples ``first``, ``first + step``, ... of a shard."""

    shard: int
    first: int
    step: int


@dataclass(frozen=True)
class SpectrumPlan:
    """The groups. They depend only on the shards, and not on workers."""

    n_examples: int
    """Number of valid examples N."""
    n_rows: int
    """Number of rows of all factors."""
    dim: int
    """Sketch coordinates D."""
    scale: float
    """Largest ‖F_i‖_F. Sums are divided by it, so that products stay in the range of float32."""
    n_shards: int
    rows_per_shard: int

    @property
    def kind(self) -> Kind:
        """What is stored of a group: a matrix (D, D), or its rows if there are at most D in all; or only traces, if
        both are too large."""
        if self.n_rows > self.dim:
            return "matrix" if self.dim <= _LARGEST else "traces"
        return "rows" if self.n_rows <= _LARGEST and self.n_rows * self.dim * 4 <= _MOST_BYTES else "traces"

    def pieces(self, group: int) -> list[Piece]:
        """Return the pieces of a group. Shards go to the groups in turn; if there are few, each is split."""
        step = -(-_PIECES // self.n_shards)
        numbers = range(group, self.n_shards * step, N_GROUPS)
        return [Piece(number // step, number % step, step) for number in numbers]

    def parts(self, group: int) -> list[Sequence[Piece]]:
        """Return the pieces of a group for each call of a worker."""
        pieces = self.pieces(group)
        rows = max(1, self.rows_per_shard // pieces[0].step)
        size = max(1, _PRODUCTS // (rows * self.dim**2)) if self.kind == "matrix" else len(pieces)
        return [pieces[first : first + size] for first in range(0, len(pieces), size)]
