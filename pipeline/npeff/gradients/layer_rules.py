"""Layer rules: gradient rows of common layers, computed from their inputs and the gradients at their outputs.

A rule applies to a module that has the layer's own `forward` (a subclass that overrides `forward` does not qualify) and
the layer's own parameter names. All other modules use the general rule in `module_rule.py`.

Legend: B batch, T positions, G groups, R rank, o outputs and i inputs of a group, c normalized features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from npeff.gradients.contribution import Contribution, Dense
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.outer import Outer, live_positions

Rule = Callable[[Any, Tensor, Sequence[Tensor], frozenset[str]], dict[str, Contribution]]
"""(module, inputs (B, m, …), R deltas (B, m, …), wanted names) -> contribution of each wanted parameter.

Where a layer receives m entries per example as one larger batch, the m entries are additional positions.
"""


def check_supported(module: Any) -> None:
    """Check that the settings of a layer with a rule permit per-example rows.

    Raises:
        UnsupportedModelError: The settings do not permit per-example rows.
    """
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        raise UnsupportedModelError(
            "an Embedding with max_norm changes its weights in the forward pass: exclude its parameters with "
            "parameters.exclude"
        )
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
        raise UnsupportedModelError(
            "an embedding with scale_grad_by_freq divides gradients by the number of occurrences in the batch, so that "
            "they are not the derivatives of the logits: set it to False, or exclude its parameters with "
            "parameters.exclude"
        )
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
        raise UnsupportedModelError(
            "a BatchNorm without running statistics makes examples depend on each other: use one with "
            "track_running_stats=True"
        )


_MAX_LIVE_FRACTION = 0.75
"""Dead positions are removed, which copies the inputs, if fewer than this fraction of the positions are live."""


def _positions(value: Tensor, n_features: int) -> Tensor:
    """Reshape (B, …positions, …features) to (B, T, …features), with T = 1 if there are no axes of positions."""
    last = value.dim() - n_features
    return value.reshape(len(value), -1, *value.shape[last:])


def _affine(
    deltas: Sequence[Tensor], inputs_BTi: Tensor, module: nn.Module, wanted: frozenset[str]
) -> dict[str, Contribution]:
    """Compute the contributions of an affine layer from R deltas (B, T, o)."""
    found: dict[str, Contribution] = {}
    if "bias" in wanted:
        found["bias"] = Dense(torch.stack([deltas_BTo.sum(1) for deltas_BTo in deltas], dim=1))
    if "weight" in wanted:
        live_BT = live_positions(deltas)
        live_T = live_BT.any(0)
        if int(live_T.sum()) < _MAX_LIVE_FRACTION * live_T.numel():
            deltas, inputs_BTi = [deltas_BTo[:, live_T] for deltas_BTo in deltas], inputs_BTi[:, live_T]
            live_BT = live_BT[:, live_T]
        shape = tuple(cast(Tensor, module.weight).shape)
        inputs_first = not isinstance(module, nn.Linear)
        rows = tuple(deltas_BTo[:, None] for deltas_BTo in deltas)
        found["weight"] = Outer(rows, inputs_BTi[:, None], shape, inputs_first, live_BT[:, None])
    return found


def linear(
    module: nn.Module, inputs: Tensor, deltas: Sequence[Tensor], wanted: frozenset[str]
) -> dict[str, Contribution]:
    """Rule of y_t = W a_t + b, including the transposed storage of W in the `Conv1D` layer of the GPT-2 family."""
    return _affine([_positions(delta, 1) for delta in deltas], _positions(inputs, 1), module, wanted)


def convolution(
    module: Any, inputs: Tensor, deltas: Sequence[Tensor], wanted: frozenset[str]
) -> dict[str, Contribution]:
    """Rule of convolutions: each output pixel is one position of a linear layer on its patch, for each group."""
    n_dims, G = len(module.kernel_size), module.groups
    B, m = inputs.shape[:2]
    # (B, m, G o, …) -> (B, G, T, o)
    rows = [delta.unflatten(2, (G, -1)).flatten(4).permute(0, 2, 1, 4, 3).flatten(2, 3) for delta in deltas]
    found: dict[str, Contribution] = {}
    if "bias" in wanted:
        found["bias"] = Dense(torch.stack([deltas_BGTo.sum(2).flatten(1) for deltas_BGTo in rows], dim=1))
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
        found["weight"] = Outer(tuple(rows), inputs_BGTi, tuple(module.weight.shape))
    return found


def embedding(module: Any, inputs: Tensor, deltas: Sequence[Tensor], wanted: frozenset[str]) -> dict[str, Contribution]:
    """Rule of embeddings: y_t is row a_t of the table. As in autograd, the padding row has no gradient."""
    indices_BT = inputs.flatten(1)
    deltas_BTRi = torch.stack([_positions(delta, 1) for delta in deltas], dim=2)
    if module.padding_idx is not None:
        deltas_BTRi = deltas_BTRi.masked_fill((indices_BT == module.padding_idx)[:, :, None, None], 0)
    live_T = live_positions(deltas_BTRi.unbind(2)).any(0)
    if not live_T.all():
        deltas_BTRi, indices_BT = deltas_BTRi[:, live_T], indices_BT[:, live_T]
    return {"weight": Rows(deltas_BTRi, indices_BT, tuple(module.weight.shape))}


def _elementwise(
    deltas: Sequence[Tensor], normalized_BTc: Tensor, shape: Iterable[int], wanted: frozenset[str]
) -> dict[str, Contribution]:
    """Compute the contributions of y_t = w ∘ x̂_t + b from R deltas (B, T, c)."""
    found: dict[str, Contribution] = {}
    if "weight" in wanted:
        rows_BRc = torch.stack([(deltas_BTc * normalized_BTc).sum(1) for deltas_BTc in deltas], dim=1)
        found["weight"] = Dense(rows_BRc.unflatten(2, tuple(shape)))
    if "bias" in wanted:
        rows_BRc = torch.stack([deltas_BTc.sum(1) for deltas_BTc in deltas], dim=1)
        found["bias"] = Dense(rows_BRc.unflatten(2, tuple(shape)))
    return found


def layer_norm(
    module: Any, inputs: Tensor, deltas: Sequence[Tensor], wanted: frozenset[str]
) -> dict[str, Contribution]:
    """Rule of LayerNorm and RMSNorm: the features are the trailing axes `normalized_shape`."""
    shape = module.normalized_shape
    if isinstance(module, nn.LayerNorm):
        normalized = functional.layer_norm(inputs, shape, None, None, module.eps)
    else:
        normalized = functional.rms_norm(inputs, shape, None, module.eps)
    k = len(shape)
    flat = [_positions(delta, k).flatten(2) for delta in deltas]
    return _elementwise(flat, _positions(normalized, k).flatten(2), shape, wanted)


def channel_norm(
    module: Any, inputs: Tensor, deltas: Sequence[Tensor], wanted: frozenset[str]
) -> dict[str, Contribution]:
    """Rule of GroupNorm and of BatchNorm with running statistics: the features are the channels, the positions are all
    axes after the channels."""
    flat = inputs.flatten(0, 1)
    if isinstance(module, nn.GroupNorm):
        normalized = functional.group_norm(flat, module.num_groups, None, None, module.eps)
    else:
        normalized = functional.batch_norm(
            flat, module.running_mean, module.running_var, None, None, False, 0.0, module.eps
        )
    normalized_BTc = _positions(normalized.unflatten(0, inputs.shape[:2]).movedim(2, -1), 1)
    channels_last = [_positions(delta.movedim(2, -1), 1) for delta in deltas]
    return _elementwise(channels_last, normalized_BTc, normalized_BTc.shape[2:], wanted)


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
    """Return the layer rule for the module's parameters `wanted`, or None if no layer rule applies."""
    if not set(wanted) <= {"weight", "bias"}:
        return None
    if (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return linear
    return _RULES.get(type(module).forward)


def per_example(value: Tensor, n_examples: int) -> Tensor:
    """Reshape (B m, …) to (B, m, …), where each example has m consecutive entries on the first axis.

    Raises:
        UnsupportedModelError: The size of the first axis is not a multiple of the number of examples.
    """
    if value.dim() == 0 or value.shape[0] % n_examples:
        raise UnsupportedModelError(
            f"the first axis of a layer has {tuple(value.shape)[:1]} entries for {n_examples} examples: "
            "put examples on the first axis of every layer (batch_first=True), or exclude the layer's parameters"
        )
    result: Tensor = value.unflatten(0, (n_examples, value.shape[0] // n_examples))
    return result
