"""Gradient rows of the layers that have a rule of their own, from their inputs and the gradients at their outputs.

A rule is used for a module whose `forward` is the layer's own (a subclass that overrides it is not such a layer) and
whose parameters are named as that layer's are. Everything else takes the general rule in `module_rule.py`.

Legend: B batch, T positions, G groups, R rank, o outputs and i inputs of a group, c normalised features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.fisher.contributions import Contribution, Dense, Outer, Rows
from pipeline.fisher.errors import UnsupportedModelError

Rule = Callable[[Any, Tensor, Tensor, frozenset[str]], dict[str, Contribution]]
"""(module, inputs (B, m, …), deltas (B, m, R, …), wanted names) -> contribution of each of its parameters.

The m uses an example makes of a layer that sees them as one larger batch are m more positions.
"""


def _positions(value: Tensor, first: int, n_features: int) -> Tensor:
    """Axes from `first` up to the last `n_features` merged into one, kept even where there are none."""
    last = value.dim() - n_features
    return value.reshape(*value.shape[:first], -1, *value.shape[last:])


def _rows_before_features(deltas: Tensor, n_features: int) -> Tensor:
    """(B, m, R, …positions, …features) -> (B, T, R, …features)."""
    last = deltas.dim() - n_features
    return _positions(deltas.movedim(2, last - 1), 1, n_features + 1)


def _affine(
    deltas_BTRo: Tensor, inputs_BTi: Tensor, module: nn.Module, wanted: frozenset[str]
) -> dict[str, Contribution]:
    found: dict[str, Contribution] = {}
    if "bias" in wanted:
        found["bias"] = Dense(deltas_BTRo.sum(1))
    if "weight" in wanted:
        live = deltas_BTRo.detach().ne(0).any(dim=(0, 2, 3))
        if not live.all():
            deltas_BTRo, inputs_BTi = deltas_BTRo[:, live], inputs_BTi[:, live]
        shape = tuple(cast(Tensor, module.weight).shape)
        inputs_first = not isinstance(module, nn.Linear)
        found["weight"] = Outer(deltas_BTRo[:, None], inputs_BTi[:, None], shape, inputs_first)
    return found


def linear(module: nn.Module, inputs: Tensor, deltas: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    """y_t = W a_t + b, and the transposed storage of W in the `Conv1D` of the GPT-2 family."""
    return _affine(_rows_before_features(deltas, 1), _positions(inputs, 1, 1), module, wanted)


def convolution(module: Any, inputs: Tensor, deltas: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    """Every output pixel is one position of a linear layer on the patch under it, separately for each group."""
    n_dims, G = len(module.kernel_size), module.groups
    B, m = deltas.shape[:2]
    # (B, m, R, G o, …) -> (B, G, T, R, o)
    deltas_BGTRo = deltas.unflatten(3, (G, -1)).flatten(5).permute(0, 3, 1, 5, 2, 4).flatten(2, 3)
    found: dict[str, Contribution] = {}
    if "bias" in wanted:
        found["bias"] = Dense(deltas_BGTRo.sum(2).transpose(1, 2).flatten(2))
    if "weight" in wanted:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        patches = functional.pad(inputs.flatten(0, 1), module._reversed_padding_repeated_twice, mode=mode)
        for axis in range(n_dims):
            dilation = module.dilation[axis]
            span = (module.kernel_size[axis] - 1) * dilation + 1
            patches = patches.unfold(2 + axis, span, module.stride[axis])[..., ::dilation]
        # (B m, G i', …outputs, …kernel) -> (B, G, T, i), i = i' × kernel
        patches = patches.flatten(2, 1 + n_dims).unflatten(1, (G, -1)).unflatten(0, (B, m))
        inputs_BGTi = patches.permute(0, 2, 1, 4, 3, *range(5, 5 + n_dims)).flatten(4).flatten(2, 3)
        found["weight"] = Outer(deltas_BGTRo, inputs_BGTi, tuple(module.weight.shape))
    return found


def embedding(module: Any, inputs: Tensor, deltas: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    """y_t = row a_t of the table; the padding row has no gradient, as in autograd."""
    if module.max_norm is not None:
        raise UnsupportedModelError("an Embedding with max_norm changes its weights when it is read: exclude it")
    deltas_BTRi, indices_BT = _rows_before_features(deltas, 1), inputs.flatten(1)
    if module.padding_idx is not None:
        deltas_BTRi = deltas_BTRi.masked_fill((indices_BT == module.padding_idx)[:, :, None, None], 0)
    live = deltas_BTRi.ne(0).any(dim=(0, 2, 3))
    if not live.all():
        deltas_BTRi, indices_BT = deltas_BTRi[:, live], indices_BT[:, live]
    return {"weight": Rows(deltas_BTRi, indices_BT, tuple(module.weight.shape))}


def _elementwise(
    deltas_BTRc: Tensor, normalised_BTc: Tensor, shape: Iterable[int], wanted: frozenset[str]
) -> dict[str, Contribution]:
    """y_t = w ∘ x̂_t + b."""
    found: dict[str, Contribution] = {}
    if "weight" in wanted:
        found["weight"] = Dense(torch.einsum("btrc,btc->brc", deltas_BTRc, normalised_BTc).unflatten(2, tuple(shape)))
    if "bias" in wanted:
        found["bias"] = Dense(deltas_BTRc.sum(1).unflatten(2, tuple(shape)))
    return found


def layer_norm(module: Any, inputs: Tensor, deltas: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    """LayerNorm and RMSNorm: features are the trailing `normalized_shape`."""
    shape = module.normalized_shape
    if isinstance(module, nn.LayerNorm):
        normalised = functional.layer_norm(inputs, shape, None, None, module.eps)
    else:
        normalised = functional.rms_norm(inputs, shape, None, module.eps)
    k = len(shape)
    deltas_BTRc = _rows_before_features(deltas, k).flatten(3)
    return _elementwise(deltas_BTRc, _positions(normalised, 1, k).flatten(2), shape, wanted)


def channel_norm(module: Any, inputs: Tensor, deltas: Tensor, wanted: frozenset[str]) -> dict[str, Contribution]:
    """GroupNorm, and BatchNorm with its running statistics: features are the channels, positions all axes after."""
    flat = inputs.flatten(0, 1)
    if isinstance(module, nn.GroupNorm):
        normalised = functional.group_norm(flat, module.num_groups, None, None, module.eps)
    elif module.running_mean is None:
        raise UnsupportedModelError("a BatchNorm without running statistics makes examples depend on each other")
    else:
        normalised = functional.batch_norm(
            flat, module.running_mean, module.running_var, None, None, False, 0.0, module.eps
        )
    normalised_BTc = _positions(normalised.unflatten(0, inputs.shape[:2]).movedim(2, -1), 1, 1)
    deltas_BTRc = _rows_before_features(deltas.movedim(3, -1), 1)
    return _elementwise(deltas_BTRc, normalised_BTc, normalised_BTc.shape[2:], wanted)


_RULES: dict[Any, Rule] = {
    nn.Linear.forward: linear,
    nn.Conv1d.forward: convolution,
    nn.Conv2d.forward: convolution,
    nn.Conv3d.forward: convolution,
    nn.Embedding.forward: embedding,
    nn.LayerNorm.forward: layer_norm,
    nn.RMSNorm.forward: layer_norm,
    nn.GroupNorm.forward: channel_norm,
    nn.BatchNorm1d.forward: channel_norm,
}


def rule_for(module: nn.Module, wanted: Iterable[str]) -> Rule | None:
    """The rule that gives the rows of the module's own parameters `wanted`, or None if it has no special rule."""
    if not set(wanted) <= {"weight", "bias"}:
        return None
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return linear
    return _RULES.get(type(module).forward)


def per_example(value: Tensor, n_examples: int) -> Tensor:
    """(B m, …) -> (B, m, …): the leading axis holds the examples, each with m consecutive entries."""
    if value.dim() == 0 or value.shape[0] % n_examples:
        raise UnsupportedModelError(
            f"a layer's leading axis has {tuple(value.shape)[:1]} entries for {n_examples} examples: "
            "examples must be on the first axis of every layer (batch_first=True), or exclude the layer"
        )
    return value.unflatten(0, (n_examples, value.shape[0] // n_examples))
