"""Matrix products with factors in half precision on a GPU, accumulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)

_LOW_SCALE = 2.0**11
"""Scale of the rounding residuals, with which the residual of a rounding to float16 cannot underflow in float16."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right. If `right` is in half precision, `left` and the result are float32.

    In that case `left` is split into a sum of two matrices in half precision, and each is multiplied by `right`. This
    costs two fast products and uses 11 + 11 bits of `left` for float16 (8 + 8 for bfloat16). Rounding `left` would use
    only half of these bits.
    """
    if right.dtype not in HALVES:
        return left @ right
    high = left.to(right.dtype)
    low = ((left - high) * _LOW_SCALE).to(right.dtype)
    return _added_in_float32(high, right) + _added_in_float32(low, right) / _LOW_SCALE


def _added_in_float32(left: Tensor, right: Tensor) -> Tensor:
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # a CPU has no product of half precision with a float32 result
