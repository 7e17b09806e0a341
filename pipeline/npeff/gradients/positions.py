"""Position shares: the evidence of an example for a direction, split over the positions of the example.

The evidence of example i for a unit direction g is ‖A_i g‖² = Σ_r (A_ir·g)², where A_i is the example's Fisher factor.
A row of A_i is a gradient. Its part from one call of a layer with outputs y_t is Σ_t (∂y_t/∂θ)ᵀ δ_rt, where δ_rt is the
gradient at position t of the output. Therefore A_ir·g splits exactly over positions:

    A_ir·g = Σ_t s_irt + o_ir,    s_irt = Σ_calls δ_rt·(∂y_t/∂θ) g,

where o_ir is the contribution of layers without the axes of positions (a pooler or classifier that reads one vector).
The evidence splits in the same way:

    ‖A_i g‖² = Σ_t share_it + other_i,    share_it = Σ_r s_irt (A_ir·g),    other_i = Σ_r o_ir (A_ir·g).

s_irt is the derivative of ⟨direction_r, logits⟩ when only the layers' outputs at position t are computed with θ + ε·g.
A share is negative if the position's contribution and the total have opposite signs. A share locates where parameters
act. It does not identify the token that is the cause: attention may have moved information between positions.

(∂y_t/∂θ) g needs no formed row. Layers with a rule are linear in their parameters, so the product is the layer's output
with g in place of the parameters. For all other modules the backward pass is differentiated (`moved_outputs`), and the
position is that of the module's output. If the backward pass has no derivative, the module's part is computed from its
rows and added to `other`.

Legend: B batch, T positions (of all axes, flattened), R rank, k directions, m entries of an example on a layer's first
axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from npeff.gradients.calls import WatchedCall
from npeff.gradients.capture import frozen, repeat
from npeff.gradients.collector import GradientCollector
from npeff.gradients.layer_rules import channel_norm, check_supported, convolution, per_example
from npeff.gradients.module_rule import module_rows, moved_outputs, output_axes


@dataclass(frozen=True)
class PositionShares:
    """Parts of the evidence, float64, in the units of the squared length of a Fisher factor's rows.

    `shares_kBT.sum(2) + other_kB` equals `evidence_kB`.
    """

    shares_kBT: Tensor
    """Part of each position; may be negative."""
    other_kB: Tensor
    """Part of the layers whose outputs do not have the axes of positions; may be negative."""
    evidence_kB: Tensor
    """‖A_i g‖², not negative."""


def position_shares(
    collector: GradientCollector,
    batch: Any,
    directions: Mapping[str, Tensor],
    positions: Sequence[int],
    examples: Sequence[int] | int | None = None,
    targets: Tensor | None = None,
) -> PositionShares:
    """Split the evidence of a batch of examples for k directions over positions.

    The cost is one forward pass and R backward passes, as in `collector.collect`, and about one more forward pass per
    direction. Modules without a layer rule, which are usually small, need a few more passes. The shares of an example
    depend on the other examples in the batch only by rounding. Padding that the model masks has share 0.

    Args:
        collector: Collector of the model.
        batch: Input of the collector's `logits_fn`.
        directions: (k, *shape) by name of the parameter in the layout. Other parameters are not moved.
        positions: Sizes of the axes of positions: (T,) for a sequence, (H, W) for an image, (choices, T). A layer has
            these axes if they, or one axis of size T, directly follow the axis of examples in the layer's output and
            are not features. Axes between positions and features are summed over. An axis of the same size by
            coincidence cannot be distinguished. A layer whose input is a batch of B·T vectors also has the positions,
            unless T is 1: the layer is then treated as one that reads a single vector.
        examples: See `GradientCollector.collect`.
        targets: See `GradientCollector.collect`.

    Returns:
        The shares of the positions, the remaining evidence and the total.

    Raises:
        ValueError: The directions do not fit the layout, or `positions` is empty or not positive.
        UnsupportedModelError: See `GradientCollector.collect`.
    """
    count = _count(collector, directions)
    if not positions or min(positions) < 1:
        raise ValueError(f"positions must be sizes of axes, each at least 1, not {tuple(positions)}")
    with frozen(collector.model):
        watched = collector.watched(batch, examples, targets)
        rank, scales_B = len(watched.labels.directions), watched.labels.scales_B
        scores = _Scores.zeros((count, rank, watched.n_examples), tuple(positions), scales_B)
        with torch.no_grad():
            for call in watched.calls:
                moving = [local for local, name in call.names.items() if name in directions]
                if not moving:
                    continue
                own = [{local: directions[call.names[local]][j] for local in moving} for j in range(count)]
                add = _add_module if call.rule is None else _add_layer
                add(scores, call, own, watched.n_examples)
    scores_kRBT, other_kRB = scores.positions_kRBT * scales_B[:, None], scores.other_kRB * scales_B
    products_kRB = scores_kRBT.sum(3) + other_kRB
    return PositionShares(
        shares_kBT=(scores_kRBT * products_kRB[..., None]).sum(1),
        other_kB=(other_kRB * products_kRB).sum(1),
        evidence_kB=products_kRB.square().sum(1),
    )


def _count(collector: GradientCollector, directions: Mapping[str, Tensor]) -> int:
    shapes = dict(zip(collector.layout.names, collector.layout.shapes, strict=True))
    counts = set()
    for name, tensor in directions.items():
        if name not in shapes or tuple(tensor.shape[1:]) != shapes[name]:
            raise ValueError(
                f"direction {name!r} of shape {tuple(tensor.shape)} does not match a parameter of the layout: give "
                "(k, *shape) by parameter name"
            )
        counts.add(len(tensor))
    if len(counts) != 1:
        raise ValueError(f"the number of directions must be the same for all parameters, not {sorted(counts)}")
    return counts.pop()


@dataclass(frozen=True)
class _Scores:
    """Running sums of s_irt and o_ir, divided by the scales of the examples."""

    positions_kRBT: Tensor
    other_kRB: Tensor
    axes: tuple[int, ...]
    """Sizes of the axes of positions."""

    @classmethod
    def zeros(cls, shape: tuple[int, int, int], axes: tuple[int, ...], like: Tensor) -> _Scores:
        return cls(like.new_zeros(*shape, math.prod(axes)), like.new_zeros(shape), axes)

    def add(self, direction: int, row: int, products: Tensor) -> None:
        """Add δ ∘ (∂y/∂θ) g of one output, already summed over the features: (B, m, …)."""
        one_vector = products.dim() == 2 and products.shape[1] == 1
        found = tuple(products.shape[1:] if products.shape[1] > 1 else products.shape[2:])
        n_positions = self.positions_kRBT.shape[3]
        if not one_vector and (found[: len(self.axes)] == self.axes or found[:1] == (n_positions,)):
            values_BT = products.reshape(len(products), n_positions, -1).double().sum(2)
            self.positions_kRBT[direction, row] += values_BT
        else:
            self.other_kRB[direction, row] += products.flatten(1).double().sum(1)

    def add_rows(self, direction: int, rows_BRx: Tensor, weights_x: Tensor) -> None:
        """Add the products of rows whose positions are not known."""
        flat_BRx = rows_BRx.double().reshape(*rows_BRx.shape[:2], -1)
        self.other_kRB[direction] += (flat_BRx @ weights_x.to(flat_BRx).flatten()).T


def _add_layer(scores: _Scores, call: WatchedCall, directions: Sequence[Mapping[str, Tensor]], n_examples: int) -> None:
    """Add the scores of a call of a layer that has a rule, for directions in the layer's parameters."""
    delta = next(delta for delta in call.deltas if delta is not None)
    check_supported(call.use.module)
    features = _feature_axes(call)
    for j, direction in enumerate(directions):
        moved = _moved_layer(call, direction, torch.promote_types(delta[0].dtype, torch.float32))
        if call.use.shared:
            moved = repeat(moved, n_examples)
        for row, delta_BX in enumerate(delta):
            scores.add(j, row, per_example(delta_BX * moved, n_examples).sum(features))


def _feature_axes(call: WatchedCall) -> tuple[int, ...]:
    """Return the axes of the output (B, m, …) that are features."""
    if call.rule in (convolution, channel_norm):
        return (2,)
    module = call.use.module
    return tuple(range(-len(module.normalized_shape), 0)) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else (-1,)


class _WithoutHooks(nn.Module):
    """Calls a layer without its hooks, because the recorded output is the layer's own output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


def _moved_layer(call: WatchedCall, direction: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Compute (∂y/∂θ) g of a layer that is linear in its parameters.

    This is the layer's output with g in place of the parameters, and zeros for parameters that are not moved.
    """

    def widened(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    module = call.use.module
    values = {
        name: (direction[name] if name in direction else torch.zeros(value.shape)).to(value.device, dtype)
        for name, value in module.named_parameters()
    }
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        # the padding row has no gradient; the direction may not be zero there if an output layer shares the table
        values["weight"] = values["weight"].clone()
        values["weight"][module.padding_idx] = 0
    values |= {name: widened(value) for name, value in module.named_buffers()}
    inputs = pytree.tree_map_only(Tensor, widened, call.use.inputs)
    named = {f"layer.{name}": value for name, value in values.items()}
    moved: Tensor = torch.func.functional_call(_WithoutHooks(module), named, *inputs, tie_weights=False)
    return moved


def _add_module(
    scores: _Scores, call: WatchedCall, directions: Sequence[Mapping[str, Tensor]], n_examples: int
) -> None:
    """Add the scores of a call of a module without a layer rule.

    The last axis of an output holds the features, unless the output has only the axis of examples.
    """
    module_call = call.module_call
    parameters = {name: value for name, value in call.parameters.items() if name in directions[0]}
    try:
        moved = moved_outputs(module_call, parameters, directions)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # the backward pass has no derivative; the rows still yield the sum over positions
        with torch.enable_grad():
            rows = module_rows(module_call, parameters, n_examples)
        for name, rows_BRx in rows.items():
            for j, direction in enumerate(directions):
                scores.add_rows(j, rows_BRx, direction[name])
        return
    axes = output_axes(module_call, parameters, n_examples)
    for j, outputs in enumerate(moved):
        for output, axis, deltas in zip(outputs, axes, module_call.deltas, strict=True):
            output = output.to(torch.promote_types(output.dtype, torch.float32))
            if output.shape != deltas.shape[1:]:  # all examples share the output; `watch` repeated it for each
                output = repeat(output, n_examples)
            for row, delta in enumerate(deltas):
                products = (delta * output).unflatten(axis, (n_examples, -1)).movedim((axis, axis + 1), (0, 1))
                scores.add(j, row, products.sum(-1) if products.dim() > 2 else products)
