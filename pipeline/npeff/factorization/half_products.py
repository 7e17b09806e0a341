"""Products with factors that stay in half precision on a GPU, added up in float32."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)

_LOW_SCALE = 2.0**11
"""What is left of a number after rounding to float16 may be too small for float16; so much larger it is not."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right; where `right` is in half precision, `left` is float32 and so is the result.

    `left` then is a sum of two matrices of that precision, each multiplied with `right` as it is: twice the fast
    product, with all 11 + 11 bits of float16 (8 + 8 of bfloat16) where rounding `left` would leave half of them.
    """
    if right.dtype not in HALVES:
        return left @ right
    high = left.to(right.dtype)
    low = ((left - high) * _LOW_SCALE).to(right.dtype)
    return _added_in_float32(high, right) + _added_in_float32(low, right) / _LOW_SCALE


def _added_in_float32(left: Tensor, right: Tensor) -> Tensor:
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()  # which has no such product
