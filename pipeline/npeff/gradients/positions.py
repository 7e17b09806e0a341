"""Where in an example a component acts: its evidence split over the example's positions.

The evidence that example i gives for a unit direction g is ‖A_i g‖² = Σ_r (A_ir·g)², with A_i the rows of its Fisher
factor. A row is a gradient, and its part for one call of a layer with outputs y_t is Σ_t (∂y_t/∂θ)ᵀ δ_rt, with δ_rt the
gradient at position t of the output. So A_ir·g splits over positions exactly,

    A_ir·g = Σ_t s_irt + o_ir,    s_irt = Σ_calls δ_rt·(∂y_t/∂θ) g,

where o_ir is what layers without the positions add (a pooler or classifier that reads one vector), and with it

    ‖A_i g‖² = Σ_t share_it + other_i,    share_it = Σ_r s_irt (A_ir·g),    other_i = Σ_r o_ir (A_ir·g).

s_irt is the derivative of ⟨direction_r, logits⟩ when the layers' outputs at position t, and only there, are computed
with θ + ε·g. A share is negative where a position pulls against the sum of all. It says at which position parameters
act, not which token is the cause: attention may have brought it there from elsewhere.

(∂y_t/∂θ) g needs no row: layers with a rule are linear in their parameters, so it is the layer's output with g in their
place; for every other module the backward pass is differentiated (`moved_outputs`), and position is that of its output.
Where this cannot be done, the module's part is in `other`, from its rows.

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

from npeff.gradients.capture import frozen, repeat
from npeff.gradients.collector import GradientCollector, WatchedCall
from npeff.gradients.layer_rules import channel_norm, check_supported, convolution, per_example
from npeff.gradients.module_rule import module_rows, moved_outputs, output_axes


@dataclass(frozen=True)
class PositionShares:
    """Parts of the evidence, float64, in the units of the squared length of a Fisher factor's rows.

    Shares may be negative; `shares_kBT.sum(2) + other_kB` is `evidence_kB`.
    """

    shares_kBT: Tensor
    other_kB: Tensor
    """Of layers whose output does not have the positions."""
    evidence_kB: Tensor
    """‖A_i g‖², at least 0."""


def position_shares(
    collector: GradientCollector,
    batch: Any,
    directions: Mapping[str, Tensor],
    positions: Sequence[int],
    examples: Sequence[int] | int | None = None,
    targets: Tensor | None = None,
) -> PositionShares:
    """The evidence of a batch's examples for k directions, split over positions.

    One forward pass and R backward passes as of `collector.collect`, and about one more forward pass per direction; of
    modules without a rule, which are usually small, a few more passes.

    Args:
        directions: (k, *shape) by name of the parameter in the layout; those that it does not name are not moved.
        positions: sizes of the axes of the batch's positions: (T,) of a sequence, (H, W) of an image, (choices, T).
            A layer has the positions if these axes, or one of size T, come next after the examples in its output and
            are not features; axes between them and the features are summed over. Whether the size is a coincidence
            cannot be known. A layer that sees a batch of B·T vectors has them too, unless T is 1: it then looks as
            one that reads a single vector.
        examples: as of `GradientCollector.collect`.
        targets: as of `GradientCollector.collect`.

    An example's shares depend on the others in the batch by rounding only, and padding that the model masks has share
    0. Raises ValueError for directions that do not fit the layout or no positions, and as `collect` does.
    """
    count = _count(collector, directions)
    if not positions or min(positions) < 1:
        raise ValueError(f"positions must be sizes of axes, not {tuple(positions)}")
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
            raise ValueError(f"direction {name!r}, {tuple(tensor.shape)}, is not that of a parameter of the layout")
        counts.add(len(tensor))
    if len(counts) != 1:
        raise ValueError(f"directions must be of one number in all parameters, not {sorted(counts)}")
    return counts.pop()


@dataclass(frozen=True)
class _Scores:
    """s_irt and o_ir so far, divided by the examples' scales."""

    positions_kRBT: Tensor
    other_kRB: Tensor
    axes: tuple[int, ...]
    """Sizes of the axes of positions."""

    @classmethod
    def zeros(cls, shape: tuple[int, int, int], axes: tuple[int, ...], like: Tensor) -> _Scores:
        return cls(like.new_zeros(*shape, math.prod(axes)), like.new_zeros(shape), axes)

    def add(self, direction: int, row: int, products: Tensor) -> None:
        """δ ∘ (∂y/∂θ) g of one output, summed over its features: (B, m, …)."""
        one_vector = products.dim() == 2 and products.shape[1] == 1
        found = tuple(products.shape[1:] if products.shape[1] > 1 else products.shape[2:])
        n_positions = self.positions_kRBT.shape[3]
        if not one_vector and (found[: len(self.axes)] == self.axes or found[:1] == (n_positions,)):
            values_BT = products.reshape(len(products), n_positions, -1).double().sum(2)
            self.positions_kRBT[direction, row] += values_BT
        else:
            self.other_kRB[direction, row] += products.flatten(1).double().sum(1)

    def add_rows(self, direction: int, rows_BRx: Tensor, weights_x: Tensor) -> None:
        """Rows whose positions are not known."""
        flat_BRx = rows_BRx.double().reshape(*rows_BRx.shape[:2], -1)
        self.other_kRB[direction] += (flat_BRx @ weights_x.to(flat_BRx).flatten()).T


def _add_layer(scores: _Scores, call: WatchedCall, directions: Sequence[Mapping[str, Tensor]], n_examples: int) -> None:
    """A call of a layer that has a rule, for directions in its own parameters."""
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
    """Axes of the output (B, m, …) that are no positions."""
    if call.rule in (convolution, channel_norm):
        return (2,)
    module = call.use.module
    return tuple(range(-len(module.normalized_shape), 0)) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else (-1,)


class _Bare(nn.Module):
    """A layer without the hooks that others put on it: what was recorded is the layer's own output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.layer).forward(self.layer, *args, **kwargs)


def _moved_layer(call: WatchedCall, direction: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """(∂y/∂θ) g of a layer that is linear in its parameters: its output with g for them, 0 for what is not moved."""

    def widened(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    module = call.use.module
    values = {
        name: direction[name].to(value.device, dtype) if name in direction else torch.zeros_like(value, dtype=dtype)
        for name, value in module.named_parameters()
    }
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        # that row has no gradient, whatever the direction has there: the table may be an output layer's too
        values["weight"] = values["weight"].clone()
        values["weight"][module.padding_idx] = 0
    values |= {name: widened(value) for name, value in module.named_buffers()}
    inputs = pytree.tree_map_only(Tensor, widened, call.use.inputs)
    named = {f"layer.{name}": value for name, value in values.items()}
    moved: Tensor = torch.func.functional_call(_Bare(module), named, *inputs, tie_weights=False)
    return moved


def _add_module(
    scores: _Scores, call: WatchedCall, directions: Sequence[Mapping[str, Tensor]], n_examples: int
) -> None:
    """A call of any other module. An output's last axis is its features, unless it has the examples' only."""
    module_call = call.module_call
    parameters = {name: value for name, value in call.parameters.items() if name in directions[0]}
    try:
        moved = moved_outputs(module_call, parameters, directions)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        # the backward pass has no derivative; the sum over positions can be had from the rows
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
            if output.shape != deltas.shape[1:]:  # one for all examples, who were each given their own
                output = repeat(output, n_examples)
            for row, delta in enumerate(deltas):
                products = (delta * output).unflatten(axis, (n_examples, -1)).movedim((axis, axis + 1), (0, 1))
                scores.add(j, row, products.sum(-1) if products.dim() > 2 else products)
