"""Directions of components in parameter space: the lift for both kinds of Fishers, and arithmetic of directions."""

from __future__ import annotations

from npeff.directions.arithmetic import (
    cosine,
    displacement,
    inner_product,
    orthogonalized,
    parameter_norm,
    zero_directions,
)
from npeff.directions.diagonal_lift import (
    accumulate_diagonals,
    diagonal_weights,
    fisher_weighted,
    principal_direction,
    sign_weights,
)
from npeff.directions.lift import accumulate_directions, lift_weights, polish_weights, row_products

__all__ = [
    "accumulate_diagonals",
    "accumulate_directions",
    "cosine",
    "diagonal_weights",
    "displacement",
    "fisher_weighted",
    "inner_product",
    "lift_weights",
    "orthogonalized",
    "parameter_norm",
    "polish_weights",
    "principal_direction",
    "row_products",
    "sign_weights",
    "zero_directions",
]
