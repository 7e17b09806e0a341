"""Calls of the modules that own parameters, and the rows of these parameters.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from npeff.errors import as_one_line
from npeff.gradients.backward_seed import backward_seed
from npeff.gradients.capture import Use, repeat
from npeff.gradients.contribution import Contribution, Dense
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.experts import expert_rows
from npeff.gradients.labels import LabelRows
from npeff.gradients.layer_rules import Rule, check_supported, per_example, rule_for
from npeff.gradients.module_rule import ModuleCall, module_rows
from npeff.gradients.parameters import in_memory

_Rows = tuple[Tensor, ...]
"""The gradients at one output of a module: one tensor of the output's shape for each direction."""


@dataclass(frozen=True)
class WatchedCall:
    """One call of a module that owns parameters (see `owners.py`), and the gradients at the module's outputs."""

    use: Use
    deltas: tuple[_Rows | None, ...]
    """One entry per floating-point output; None where the logits do not depend on the output. At least one entry is
    not None."""
    names: Mapping[str, str]
    """Maps the name of a parameter within the module to its name in the layout."""
    axes: tuple[frozenset[int] | None, ...] | None = None
    """The axes that may hold the examples, for each output, see `ModuleCall`."""
    inside: tuple[_Rows | None, ...] = ()
    """The gradients inside a layer of experts, at `Use.routed.edges`."""

    @property
    def rule(self) -> Rule | None:
        """The rule of the layer, or None if the general rule (`module_rule.py`) applies."""
        return rule_for(self.use.module, self.names)

    @property
    def module_call(self) -> ModuleCall:
        """The input of the general rule: the call, restricted to the outputs that have a gradient."""
        live = [place for place, delta in enumerate(self.deltas) if delta is not None]
        return ModuleCall(
            self.use.module,
            self.use.inputs,
            tuple(self.use.places[place] for place in live),
            tuple(self.use.outputs[place] for place in live),
            tuple(torch.stack(delta) for delta in self.deltas if delta is not None),
            None if self.axes is None else tuple(self.axes[place] for place in live),
        )

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the module owns, by name within the module."""
        own = dict(self.use.module.named_parameters(remove_duplicate=False))
        return {name: own[name].detach() for name in self.names}


@dataclass(frozen=True)
class Collected:
    """Logits, label directions and gradient rows of a batch.

    `contributions` omits the parameters that the logits do not depend on.
    """

    logits: Tensor
    """(B, C) or (B, T, C)."""
    labels: LabelRows
    contributions: dict[str, Contribution]
    """The gradient rows by parameter name, divided by `labels.scales_B` like the directions."""


def call_rows(call: WatchedCall, n_examples: int, widen: CachedWidening) -> dict[str, Contribution]:
    """Return the contributions of one module call, by the names of the parameters in the layout."""
    use, rule = call.use, call.rule
    for module in use.module.modules():
        check_supported(module)
    if use.routed is not None and not use.shared:
        with torch.no_grad():
            routed = replace(use.routed, inputs=tuple(_widened(each) for each in use.routed.inputs))
            deltas = [delta and [_widened(row) for row in delta] for delta in call.inside]
            found = expert_rows(use.module, routed, deltas, frozenset(call.names), n_examples)
        return {call.names[name]: part for name, part in found.items()}
    if rule is None:
        with in_memory(use.module.parameters()):
            general = module_rows(call.module_call, call.parameters, n_examples)
        return {call.names[name]: Dense(_widened(value)) for name, value in general.items()}
    (delta,) = call.deltas
    assert delta is not None
    args, kwargs = use.inputs
    inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
    if use.shared:
        inputs = repeat(inputs, n_examples)
    with torch.no_grad():
        inputs = per_example(widen(inputs), n_examples)
        rows = [_widened(per_example(row, n_examples)) for row in delta]
        parts = rule(use.module, inputs, rows, frozenset(call.names))
    return {call.names[name]: part for name, part in parts.items()}


def output_gradients(
    logits: Tensor, edges: Sequence[Sequence[GradientEdge]], directions: Sequence[Tensor]
) -> list[tuple[_Rows | None, ...]]:
    """Compute the gradients of ⟨direction, logits⟩ at the edges of each use; None if all are zero.

    The directions have the shape of the logits. Each direction takes one backward pass.
    """
    flat = [edge for each in edges for edge in each]
    passes = []
    for row in range(len(directions)):
        retain = row + 1 < len(directions)
        try:
            seed = backward_seed(logits, directions[row])
            passes.append(torch.autograd.grad(seed, flat, retain_graph=retain, allow_unused=True))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # reentrant checkpoints, operations without a derivative
            raise UnsupportedModelError(
                f"the backward pass of the model fails ({as_one_line(error, 200)}): change this operation, or exclude "
                "the parameters below it with parameters.exclude"
            ) from error
    # autograd returns None in every pass for an output that the logits do not depend on
    columns = iter([None if column[0] is None else column for column in zip(*passes, strict=True)])
    return [tuple(next(columns) for _ in each) for each in edges]


def _widened(value: Tensor) -> Tensor:
    """Convert half precision to float32, for accurate sums over positions."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


class CachedWidening:
    """`_widened` with a cache, so that layers with the same input tensor also share the converted tensor."""

    def __init__(self) -> None:
        self._cache: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Tensor) -> Tensor:
        key = value.data_ptr(), value.shape, value.stride(), value.dtype
        if key not in self._cache:
            self._cache[key] = (value, _widened(value))
        return self._cache[key][1]
