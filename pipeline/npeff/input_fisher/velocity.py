"""Derivatives of logits in one direction: of the inputs, J_x ẋ, or of the parameters, J_θ ĝ.

Forward mode computes one in a single pass. Where a function of the model has no forward mode, two backward passes
compute the same: J ẋ is the derivative of ẋᵀ Jᵀ c with respect to c. Attention is computed without fused kernels, which
have neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from npeff.errors import ItemError


class Derivative:
    """A function of tensors, and its derivative in a direction.

    Args:
        function: Function that returns one tensor.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function, self._forward_mode = function, True

    def __call__(self, at: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the value of the function, and its derivative.

        Args:
            at: The arguments of the function.
            direction: Their derivatives, of the same shapes.
        """
        with sdpa_kernel(SDPBackend.MATH):
            if self._forward_mode:
                try:
                    return self._by_forward_mode(at, direction)
                except (NotImplementedError, RuntimeError, ItemError):
                    self._forward_mode = False  # an error of the function itself is raised again below
            return self._by_double_backward(at, direction)

    def _by_forward_mode(self, at: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), forward_ad.dual_level():
            duals = [forward_ad.make_dual(value, change) for value, change in zip(at, direction, strict=True)]
            value, change = forward_ad.unpack_dual(self._function(*duals))
            return value, torch.zeros_like(value) if change is None else change

    def _by_double_backward(self, at: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = [value.detach().requires_grad_() for value in at]
            value = self._function(*inputs)
            weights = torch.zeros_like(value, requires_grad=True)
            gradients = torch.autograd.grad(
                value, inputs, weights, create_graph=True, allow_unused=True, materialize_grads=True
            )
            (change,) = torch.autograd.grad(
                gradients, weights, list(direction), allow_unused=True, materialize_grads=True
            )
        return value.detach(), change


class _OfParameters(nn.Module):
    """A function of inputs that calls a model, as a module whose parameters are those of the model."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self._function = model, (function,)  # in a tuple, since it may be the model itself

    def forward(self, values: Tensor) -> Tensor:
        return self._function[0](values)


def change_along(
    model: nn.Module, direction: Mapping[str, Tensor], logits: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """Return a function of inputs (n, ...) that computes J_θ ĝ, the derivative of the logits for a step along ĝ.

    Args:
        model: The model with parameters θ.
        direction: ĝ, by the names of the parameters.
        logits: Function of inputs that calls the model.
    """
    module = _OfParameters(model, logits)
    parameters = {f"model.{name}": model.get_parameter(name).detach() for name in direction}
    tangents = [direction[name].to(model.get_parameter(name)) for name in direction]

    def change(values: Tensor) -> Tensor:
        def of_parameters(*given: Tensor) -> Tensor:
            logits: Tensor = functional_call(module, dict(zip(parameters, given, strict=True)), (values,))
            return logits

        return Derivative(of_parameters)(list(parameters.values()), tangents)[1]

    return change
