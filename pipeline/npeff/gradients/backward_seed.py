"""The start of a backward pass with a given gradient at the logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def backward_seed(logits: Tensor, direction: Tensor) -> Tensor:
    """Return a scalar whose gradient is that of ⟨direction, logits⟩. Its value is 0.

    `torch.autograd.grad` accepts the direction itself, but it then imports sympy, which takes a second in each process.
    """
    seed: Tensor = _Seed.apply(logits, direction)  # type: ignore[no-untyped-call]
    return seed


class _Seed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, direction: Tensor) -> Tensor:
        ctx.direction = direction
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.direction, None
