"""Two-sided random sign projections of parameters, G (o × i) to S G Tᵀ (m × n), as in LoGra and bergson.

S and T have independent entries ±1/√m and ±1/√n. E[SᵀS] and E[TᵀT] are identities, so inner products are preserved on
average. In contrast to a tensor sketch, every parameter has separate coordinates. The number of coordinates therefore
grows with the number of layers, even if fewer would suffice for the inner products. (LoGra: Choe et al.,
arXiv 2405.13954.)

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
    """The matrices S and T of a parameter that is reshaped to shape[0] × rest.

    The matrices are stored without their factors 1/√m and 1/√n. `scale` is the product of the factors. A side that has
    no more entries than the projection would keep is not projected: its matrix is the identity. This always holds for
    the right side of a bias, o × 1.
    """

    left_mo: Tensor
    right_ni: Tensor
    scale: float

    @classmethod
    def draw(cls, seed: int, name: str, shape: tuple[int, ...], size: int) -> Projection:
        """Draw the projection of parameter `name` to at most `size` × `size` coordinates.

        The result depends only on the arguments.
        """
        left_mo, left_scale = _side(f"kronecker rows:{seed}:{name}", shape[0] if shape else 1, size)
        right_ni, right_scale = _side(f"kronecker columns:{seed}:{name}", math.prod(shape[1:]), size)
        return cls(left_mo, right_ni, left_scale * right_scale)

    @property
    def n_coordinates(self) -> int:
        """m n, the number of coordinates of the projected parameter."""
        return len(self.left_mo) * len(self.right_ni)

    def to(self, device: torch.device) -> Projection:
        return Projection(self.left_mo.to(device), self.right_ni.to(device), self.scale)

    def apply(self, contribution: Contribution) -> Tensor:
        """Compute S G Tᵀ of every row G: (B, R, m n).

        Where a row is a product, its factors are projected and G is not formed.
        """
        if isinstance(contribution, Sum):
            return torch.stack([self.apply(part) for part in contribution.parts]).sum(0)
        left_mo, right_ni = (side.to(contribution.new_zeros(0).dtype) for side in (self.left_mo, self.right_ni))
        if isinstance(contribution, Outer):
            projected_BRmn = _project_outer(contribution, left_mo, right_ni)
        elif isinstance(contribution, Rows):
            rows_BTm = left_mo.T[contribution.indices_BT]
            projected_BRmn = torch.einsum("btm,btrn->brmn", rows_BTm, contribution.deltas_BTRi @ right_ni.T)
        else:
            matrix = left_mo.shape[1], right_ni.shape[1]
            projected_BRmn = torch.cat(
                [left_mo @ (rows.unflatten(2, matrix) @ right_ni.T) for _, _, rows in flat_blocks(contribution)]
            )
        return projected_BRmn.flatten(2) * self.scale


def _project_outer(outer: Outer, left_mo: Tensor, right_ni: Tensor) -> Tensor:
    """Compute Σ_t (S δ_t) ⊗ (T a_t): (B, R, m, n). Each group has separate rows of the parameter."""
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
    """Return signs (size, length), int8, and the factor 1/√size; the identity and 1 if `length` is at most `size`."""
    if length <= size:
        return torch.eye(length, dtype=torch.int8), 1.0
    bits = np.unpackbits(random_bits(key, -(-size * length // 64)).astype("<u8").view(np.uint8))
    return torch.from_numpy(1 - 2 * bits[: size * length].astype(np.int8)).view(size, length), size**-0.5
