"""Updates of a model as low-rank adapters: factors of the updates of linear layers, and what they leave out.

PEFT computes W x + (alpha/r) B A x with A (r, in) and B (out, r) (Hu et al., 2021, https://arxiv.org/abs/2106.09685,
section 4.1). The factors of an update ΔW are those of its singular value decomposition, which is the best approximation
of rank r in the Frobenius norm. All layers have the same rank, and alpha = r, because not every program that reads
adapters reads a rank for each layer.

Shapes: O outputs and I inputs of a layer, R rank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from npeff.runs.config_reading import ConfigError

MOST_RANK = 256
"""Largest rank that is chosen for an error. A larger one must be asked for."""

_LARGE = 2**22
"""Number of entries of a matrix above which its decomposition is computed in float32."""


@dataclass(frozen=True)
class LoraLayer:
    """The factors of the update of one linear layer, with B A ≈ ΔW of shape (O, I)."""

    module: str
    parameter: str
    a_RI: Tensor
    b_OR: Tensor
    transposed: bool
    """Whether the layer stores its weight as (I, O), as Conv1D of transformers does."""
    norm: float
    """‖ΔW‖."""
    error: float
    """‖ΔW − B A‖ ÷ ‖ΔW‖."""

    @property
    def update(self) -> Tensor:
        """The update of the parameter that the factors make, in its shape."""
        product = self.b_OR @ self.a_RI
        return product.T if self.transposed else product


@dataclass(frozen=True)
class LoraUpdate:
    """An update of a model as factors of its linear layers.

    Attributes:
        rank: the common rank R.
        layers: the linear layers whose weights change, in the order of the model.
        omitted: norm of the update by parameter, of parameters that are not the weight of a linear layer.
    """

    rank: int
    layers: tuple[LoraLayer, ...]
    omitted: Mapping[str, float]

    @cached_property
    def norm(self) -> float:
        """The norm of the whole update."""
        return math.hypot(*(layer.norm for layer in self.layers), *self.omitted.values())

    @property
    def truncation_error(self) -> float:
        """‖ΔW − B A‖ of all layers ÷ the norm of the whole update."""
        return math.hypot(*(layer.norm * layer.error for layer in self.layers)) / self.norm

    @property
    def omitted_share(self) -> float:
        """The norm of the omitted parameters' update ÷ the norm of the whole update."""
        return math.hypot(*self.omitted.values()) / self.norm

    @property
    def error(self) -> float:
        """The norm of everything that is left out ÷ the norm of the whole update."""
        return math.hypot(self.truncation_error, self.omitted_share)


def lora_update(model: nn.Module, update: Mapping[str, Tensor], *, error: float, rank: int | None) -> LoraUpdate:
    """Factorize the update of a model.

    Args:
        model: The model, whose modules say which parameters are weights of linear layers.
        update: Change by parameter name.
        error: Largest error ‖ΔW − B A‖ ÷ ‖ΔW‖ of a layer, for the smallest rank that is chosen, up to `MOST_RANK`.
        rank: The rank, in place of `error`.

    Raises:
        ConfigError: The update is zero or not finite, or changes no weight of a linear layer.
    """
    changed = {name: value.detach().float().cpu() for name, value in update.items() if bool(value.any())}
    if not changed:
        raise ConfigError("the update is zero, so there is nothing to export")
    if not all(bool(torch.isfinite(value).all()) for value in changed.values()):
        raise ConfigError("the update is not finite: use a smaller --epsilon")
    linear = {name: owner for name, owner in _linear_weights(model).items() if name in changed}
    omitted = {name: float(value.double().norm()) for name, value in changed.items() if name not in linear}
    if not linear:
        raise ConfigError(
            f"the update changes no weight of a linear layer, only {', '.join(list(omitted)[:3])}: an adapter of this "
            "kind cannot express it"
        )
    found = {
        name: _decomposed(changed[name].T if transposed else changed[name]) for name, (_, transposed) in linear.items()
    }
    chosen = rank or min(MOST_RANK, max(_rank_for(values, error) for _, values, _ in found.values()))
    layers = tuple(_layer(name, *linear[name], *found[name], chosen) for name in linear)
    return LoraUpdate(chosen, layers, omitted)


def _linear_weights(model: nn.Module) -> dict[str, tuple[str, bool]]:
    """Return the linear layers that PEFT can adapt: the name of the module, and whether the weight is (I, O).

    A weight that several modules share is none of them, because an adapter of one module does not change the others. A
    projection inside of ``nn.MultiheadAttention`` is read without its module, so an adapter of it would do nothing.
    """
    owners = defaultdict[int, list[str]](list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)].append(name)
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    found = {}
    for name, module in model.named_modules():
        transposed = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        inside = any(name.startswith(f"{attention}.") for attention in attentions)
        if (isinstance(module, nn.Linear) or transposed) and name and not inside:
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and len(owners[id(weight)]) == 1:
                found[f"{name}.weight"] = (name, transposed)
    return found


def _decomposed(update_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if update_OI.numel() <= _LARGE else torch.float32
    u, values, vh = torch.linalg.svd(update_OI.to(dtype), full_matrices=False)
    return u, values, vh


def _rank_for(values: Tensor, error: float) -> int:
    """Return the smallest rank whose truncation has at most this relative error."""
    squares = values.double().square()
    left_out = torch.cat([squares.flip(0).cumsum(0).flip(0)[1:], squares.new_zeros(1)])
    return 1 + int((left_out.sqrt() > error * squares.sum().sqrt()).sum())


def _layer(
    parameter: str, module: str, transposed: bool, u: Tensor, values: Tensor, vh: Tensor, rank: int
) -> LoraLayer:
    roots, n = values[:rank].sqrt(), min(rank, len(values))
    b_OR, a_RI = u.new_zeros(len(u), rank), vh.new_zeros(rank, vh.shape[1])
    b_OR[:, :n], a_RI[:n] = u[:, :rank] * roots, roots[:, None] * vh[:rank]
    norm = float(values.double().norm())
    error = float(values[rank:].double().norm()) / norm
    return LoraLayer(module, parameter, a_RI.float(), b_OR.float(), transposed, norm, error)


def target_modules(model: nn.Module, update: LoraUpdate) -> list[str] | str:
    """Return the layers of the adapter for PEFT, which takes a name in a list also as the end of other names.

    If the name of another layer ends with one of these names, the result is a regular expression.
    """
    import re

    names = [layer.module for layer in update.layers]
    others = {name for name, _ in model.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for other in others for name in names):
        return f"^({'|'.join(map(re.escape, names))})$"
    return names


def tensors(update: LoraUpdate) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the adapter's file with their names."""
    for layer in update.layers:
        yield f"base_model.model.{layer.module}.lora_A.weight", layer.a_RI.contiguous()
        yield f"base_model.model.{layer.module}.lora_B.weight", layer.b_OR.contiguous()
