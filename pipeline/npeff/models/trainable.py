"""Models whose parameters can take part in a backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from npeff.gradients import UnsupportedModelError


def trainable(model: nn.Module) -> nn.Module:
    """Return the model, with ordinary tensors in place of inference tensors.

    Tensors that were made under `torch.inference_mode` cannot require a gradient.

    Raises:
        UnsupportedModelError: The model contains a TorchScript module, which has no hooks.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"module {name!r} is a TorchScript module, whose layers cannot be observed: return the original Python "
                "module from the task's model()"
            )
    copies: dict[int, Tensor] = {}

    def ordinary(value: Tensor) -> Tensor:
        if id(value) not in copies:
            copy = value.detach().clone()
            copies[id(value)] = nn.Parameter(copy, value.requires_grad) if isinstance(value, nn.Parameter) else copy
        return copies[id(value)]

    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is not None and value.is_inference():
                        tensors[name] = ordinary(value)  # type: ignore[assignment]  # parameters stay parameters
    return model
