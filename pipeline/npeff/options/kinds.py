"""Kinds of factorization: what is factorized, and by which method."""

from __future__ import annotations

from typing import Literal

DiagonalKind = Literal["diagonal_groups", "diagonal_entries"]
"""Kinds whose components are non-negative vectors of groups or entries of the diagonal Fishers."""

RowKind = Literal["gradients", "squared"]
"""Kinds that are non-negative matrix factorizations of one row for each example, computed from its Fisher factor."""

DirectKind = Literal["kmeans", "pca", "random"]
"""Kinds that are not fitted by the iterations of the solver."""

FactorizationKind = Literal["fishers", DiagonalKind, RowKind, DirectKind]


def is_diagonal(kind: str) -> bool:
    """Return whether the components of a kind are of diagonals. The others are unit vectors in the sketch."""
    return kind.startswith("diagonal_")


def rows_per_example(kind: str, rank: int) -> int:
    """Return the number of rows of one example that a kind factorizes, for Fishers of a rank."""
    return rank if kind in ("fishers", "pca", "random") else 1


FACTORIZED = {
    "fishers": "Fishers",
    "diagonal_groups": "diagonal Fishers",
    "diagonal_entries": "diagonal Fishers",
    "gradients": "gradients",
    "squared": "squared Fisher factors",
    "kmeans": "gradients",
    "pca": "Fishers",
    "random": "Fishers",
}
"""What a kind approximates, for messages."""
