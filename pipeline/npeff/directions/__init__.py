"""Directions of components in parameter space: the lift for both kinds of Fishers, whitening, and arithmetic."""

from __future__ import annotations

from npeff.directions.arithmetic import (
    cosine,
    displacement,
    gram,
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
    signed_roots,
)
from npeff.directions.lift import accumulate_directions, lift_weights, polish_weights, row_products
from npeff.directions.whitening import Whitening, lifted_sketches, product_sums, unit_sketches, whitening

__all__ = [
    "Whitening",
    "accumulate_diagonals",
    "accumulate_directions",
    "cosine",
    "diagonal_weights",
    "displacement",
    "fisher_weighted",
    "gram",
    "inner_product",
    "lift_weights",
    "lifted_sketches",
    "orthogonalized",
    "parameter_norm",
    "polish_weights",
    "principal_direction",
    "product_sums",
    "row_products",
    "sign_weights",
    "signed_roots",
    "unit_sketches",
    "whitening",
    "zero_directions",
]
