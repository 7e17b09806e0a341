"""The gradient of a weighted loss of labelled examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from npeff.models.loaded import LoadedModel


def loss_gradient(
    loaded: LoadedModel, batch: Any, targets: Tensor, weights: Sequence[float], names: Iterable[str]
) -> tuple[float, dict[str, Tensor]]:
    """Compute Σ_i w_i · (−log p(label_i)) of a batch, and its gradient.

    Args:
        loaded: The model.
        batch: Input of the task's ``logits``.
        targets: The class of each prediction. Negative ones are left out.
        weights: The weight of each example.
        names: Names of the parameters.

    Returns:
        The loss, and the gradient by parameter name.
    """
    weights_B = torch.tensor(weights, dtype=torch.float64)
    parameters = {name: loaded.model.get_parameter(name) for name in names}
    with _requiring_grad(parameters):
        logits = loaded.logits(loaded.model, batch)
        made = targets >= 0
        wide = logits[made] if logits.dtype == torch.float64 else logits[made].float()
        losses = nn.functional.cross_entropy(wide, targets[made], reduction="none")
        loss = losses.double() @ weights_B.to(losses.device)[made.nonzero()[:, 0]]
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return float(loss.detach()), dict(zip(parameters, gradients, strict=True))


@contextmanager
def _requiring_grad(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])
