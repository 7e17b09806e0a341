"""Two-sided projections of parameters by random signs: G (o × i) to S G Tᵀ (m × n), as in LoGra and bergson.

S and T have independent entries ±1/√m and ±1/√n, so E[SᵀS] and E[TᵀT] are identities, and inner products are kept on
average. Unlike in a tensor sketch every parameter has coordinates of its own: their number grows with that of the
layers, however few coordinates the inner products would need. (LoGra: Choe et al., arXiv 2405.13954.)

Legend: B batch, R rank, T positions, G groups, o outputs and i inputs of a group, m rows and n columns kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npeff.gradients.contribution import Contribution, flat_blocks
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.outer import Outer
from npeff.gradients.sums import Sum
from npeff.sketches.tensorsketch import random_bits


@dataclass(frozen=True)
class Projection:
    """S and T of a parameter, seen as shape[0] × rest, without their factors 1/√m and 1/√n, whose product is `scale`.

    A side that is not longer than what would be kept of it is left as it is: its matrix is the identity. Of a bias,
    o × 1, that is always so on the right.
    """

    left_mo: Tensor
    right_ni: Tensor
    scale: float

    @classmethod
    def draw(cls, seed: int, name: str, shape: tuple[int, ...], size: int) -> Projection:
        """Of parameter `name`, to at most `size` × `size` coordinates; determined by the arguments and nothing else."""
        left_mo, left_scale = _side(f"kronecker rows:{seed}:{name}", shape[0] if shape else 1, size)
        right_ni, right_scale = _side(f"kronecker columns:{seed}:{name}", math.prod(shape[1:]), size)
        return cls(left_mo, right_ni, left_scale * right_scale)

    @property
    def n_coordinates(self) -> int:
        """m n"""
        return len(self.left_mo) * len(self.right_ni)

    def to(self, device: torch.device) -> Projection:
        return Projection(self.left_mo.to(device), self.right_ni.to(device), self.scale)

    def apply(self, contribution: Contribution) -> Tensor:
        """(B, R, m n): S G Tᵀ of every row G. Where a row is a product its factors are projected; G is not formed."""
        if isinstance(contribution, Sum):
            return torch.stack([self.apply(part) for part in contribution.parts]).sum(0)
        left_mo, right_ni = (side.to(contribution.new_zeros(0).dtype) for side in (self.left_mo, self.right_ni))
        if isinstance(contribution, Outer):
            projected_BRmn = _of_outer(contribution, left_mo, right_ni)
        elif isinstance(contribution, Rows):
            rows_BTm = left_mo.T[contribution.indices_BT]
            projected_BRmn = torch.einsum("btm,btrn->brmn", rows_BTm, contribution.deltas_BTRi @ right_ni.T)
        else:
            matrix = left_mo.shape[1], right_ni.shape[1]
            projected_BRmn = torch.cat(
                [left_mo @ (rows.unflatten(2, matrix) @ right_ni.T) for _, _, rows in flat_blocks(contribution)]
            )
        return projected_BRmn.flatten(2) * self.scale


def _of_outer(outer: Outer, left_mo: Tensor, right_ni: Tensor) -> Tensor:
    """(B, R, m, n): Σ_t (S δ_t) ⊗ (T a_t), where the groups have each their rows of the parameter."""
    of_deltas, of_inputs = (right_ni, left_mo) if outer.inputs_first else (left_mo, right_ni)
    deltas_Gom = of_deltas.T.unflatten(0, (outer.inputs_BGTi.shape[1], -1))
    inputs_Bxn = (outer.inputs_BGTi @ of_inputs.T).flatten(1, 2)
    rows = []
    for deltas_BGTo in outer.deltas:
        deltas_Bxm = torch.einsum("bgto,gom->bgtm", deltas_BGTo, deltas_Gom).flatten(1, 2)
        product_Bmn = deltas_Bxm.mT @ inputs_Bxn
        rows.append(product_Bmn.mT if outer.inputs_first else product_Bmn)
    return torch.stack(rows, dim=1)


def _side(key: str, length: int, size: int) -> tuple[Tensor, float]:
    """Signs (size, length), int8, and their factor 1/√size; the identity where `length` is at most `size`."""
    if length <= size:
        return torch.eye(length, dtype=torch.int8), 1.0
    bits = np.unpackbits(random_bits(key, -(-size * length // 64)).astype("<u8").view(np.uint8))
    return torch.from_numpy(1 - 2 * bits[: size * length].astype(np.int8)).view(size, length), size**-0.5
