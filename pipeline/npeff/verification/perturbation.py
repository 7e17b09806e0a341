"""Move a model's parameters along a direction and see which predictions change.

A component claims: examples with large coefficients are treated alike, along this direction. The test (Matena & Raffel,
arXiv 2310.04649, section 5) moves θ by ±ε·ĝ with ‖ĝ‖ = 1 and compares the mean KL(p_moved ‖ p_original) on the top
examples with that on a baseline: their quotient is the KL ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def moved(model: nn.Module, direction: Mapping[str, Tensor], step: float) -> Iterator[None]:
    """θ + step·direction inside the context; outside it every parameter has its former bits, also after an exception.

    Args:
        direction: tensors by parameter name; parameters that it does not name stay.
        step: ε times the sign, in units of the direction's length.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    before = {name: parameters[name].detach().clone() for name in direction}
    try:
        with torch.no_grad():
            for name, tensor in direction.items():
                parameters[name].add_(tensor.to(parameters[name]), alpha=step)
        yield
    finally:
        with torch.no_grad():
            for name, tensor in before.items():
                parameters[name].copy_(tensor)
