"""The leading eigenvalues and eigenvectors of a mean Fisher F̄ = BᵀB, from sketched rows B̂.

The eigenvectors U (n, k) of B̂B̂ᵀ are approximate eigenvectors of BBᵀ. The Rayleigh-Ritz method in the span of BᵀU takes
one pass for V = BᵀU and one for BV. Its eigenvalues and eigenvectors are those of F̄ restricted to the span. This is a
step of subspace iteration (Halko, Martinsson & Tropp, SIAM Review 53, 2011, section 5.1) that starts at the sketch.

Legend: n rows of B, D sketch, k directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from npeff.training.checks import is_count
from npeff.training.errors import TrainingError
from npeff.training.natural_gradient import Direction
from npeff.training.smaller_gram import Blocks, smaller_gram

_RELATIVE = 1e-10
"""Eigenvalues below this fraction of the largest one are rounding errors."""


def sketched_eigenvectors(rows: Blocks, count: int) -> Tensor:
    """Return the leading eigenvectors (k, n) of B̂B̂ᵀ, float64: ``count``, or fewer if the rank is smaller.

    Args:
        rows: Returns the sketched rows in order, in blocks (m, D).
        count: Largest number of eigenvectors.

    Raises:
        TrainingError: The count is below 1, or all rows are zero.
    """
    if not is_count(count):
        raise TrainingError(f"the rank of a low-rank Fisher must be a whole number of at least 1, not {count!r}")
    matrix, by_rows, _ = smaller_gram(rows)
    values_k, vectors = _leading(matrix, count)
    if by_rows:
        return vectors.T
    return torch.cat([block_mD.double() @ vectors for block_mD in rows()]).T / values_k.sqrt()[:, None]


def leading_eigenpairs(
    vectors_kn: Tensor,
    weighted_sums: Callable[[Tensor], Direction],
    products: Callable[[Mapping[str, Tensor]], Tensor],
) -> tuple[Tensor, Direction]:
    """Return the Ritz values and vectors of F̄ in the span of Bᵀ times some vectors.

    Args:
        vectors_kn: Vectors such as those of `sketched_eigenvectors`.
        weighted_sums: Returns Bᵀ w for several w (k, n): tensors (k, *shape) by parameter name.
        products: Returns B v (k, n), float64, for several v: tensors (k, *shape) by parameter name.

    Returns:
        The eigenvalues (k,), float64 and descending, and the orthonormal eigenvectors: tensors (k, *shape).
    """
    spans = weighted_sums(vectors_kn)
    gram_kk = _gram(spans)
    values_k, basis_kk = _leading(gram_kk, len(gram_kk))
    basis_kk = basis_kk / values_k.sqrt()  # orthonormal combinations of the span
    products_kn = basis_kk.T @ products(spans)
    ritz_k, rotation_kk = _leading(products_kn @ products_kn.T, len(values_k))
    combinations_kk = (basis_kk @ rotation_kk).T
    directions = {}
    for name, rows in spans.items():
        combined = combinations_kk.to(rows) @ rows.reshape(len(rows), -1)
        directions[name] = combined.reshape(-1, *rows.shape[1:])
    return ritz_k, directions


def _gram(spans: Direction) -> Tensor:
    found = [rows.reshape(len(rows), -1).double() for rows in spans.values()]
    total: Tensor = torch.stack([(flat @ flat.T).cpu() for flat in found]).sum(0)
    return total


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues, descending and not negligible, and the eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    kept = values > _RELATIVE * values[:1]
    if not bool(kept.any()):
        raise TrainingError("the Fisher is zero: it has no leading directions")
    return values[kept], vectors[:, kept]
