"""Rows of a stack of matrices, at random."""

from __future__ import annotations

import torch
from npeff.gradients.routed import Routed
from torch import Tensor


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def routed(pairs: int = 23, inputs_first: bool = False) -> Routed:
    """5 examples of rank 2, with 7 matrices of 4 outputs and 3 inputs; some matrices are in no example."""
    places_n = (torch.randint(0, 6, (pairs,)) * 5 + torch.randint(0, 5, (pairs,))).sort().values
    shape = (7, 3, 4) if inputs_first else (7, 4, 3)
    deltas = draw(pairs, 4), draw(pairs, 4)
    return Routed(deltas, draw(pairs, 3), places_n // 5, places_n % 5, 5, shape, inputs_first)
