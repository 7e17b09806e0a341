"""Perturbation of a model's parameters along a direction.

The hypothesis of a component is that the model processes examples with large coefficients in the same way, along this
direction. The test (Matena & Raffel, arXiv 2310.04649, section 5) moves θ by ±ε·ĝ with ‖ĝ‖ = 1. It compares the mean
KL(p_moved ‖ p_original) on the top examples with the mean on baseline examples. The quotient is the KL ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from npeff.gradients import in_memory


@contextmanager
def moved(model: nn.Module, direction: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """Set the parameters to θ + step·direction inside the context, and restore their exact values on exit.

    The values are also restored after an exception.

    Args:
        model: The model with parameters θ.
        direction: Tensors by parameter name. Other parameters do not change.
        step: ε times the sign, in units of the direction's length.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before: dict[str, Tensor] = {}
    try:
        with torch.no_grad():
            for name, tensor in direction.items():
                parameter = parameters[name]
                with in_memory([parameter], changed=True):
                    before[name] = parameter.detach().clone()
                    parameter.add_(tensor.to(parameter), alpha=step)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                with in_memory([parameters[name]], changed=True):
                    parameters[name].copy_(tensor)
