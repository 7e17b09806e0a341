"""Models and batches in half precision, converted to float32.

Gradients with respect to the inputs are squared and summed over draws, so they are computed in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from npeff.gradients import UnsupportedModelError, is_quantized

_HALF = (torch.float16, torch.bfloat16)


def is_half(value: Tensor) -> bool:
    return value.dtype in _HALF


def in_single_precision(model: nn.Module) -> nn.Module:
    """Return the model itself, or a copy in float32 if some of its parameters or buffers are in half precision.

    Raises:
        UnsupportedModelError: The model has quantized weights, whose layers compute in half precision.
    """
    if not any(map(is_half, (*model.parameters(), *model.buffers()))):
        return model
    if any(map(is_quantized, model.parameters())):
        raise UnsupportedModelError(
            "gradients with respect to the inputs are computed in float32, and the layers with quantized weights in "
            "half precision: set task.options.dtype to float32"
        )
    copied = copy.deepcopy(model)
    for value in (*copied.parameters(), *copied.buffers()):
        value.data = _converted(value.data)
    return copied


def batch_in_single_precision(batch: Any) -> Any:
    """Return a batch, or a tensor, with its tensors of half precision converted to float32."""
    if isinstance(batch, Tensor):
        return _converted(batch)
    if isinstance(batch, Mapping):
        return {key: batch_in_single_precision(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*map(batch_in_single_precision, batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map(batch_in_single_precision, batch))
    return batch


def _converted(value: Tensor) -> Tensor:
    return value.float() if is_half(value) else value
