"""Per-example gradient rows of a model, without a weight gradient ever being formed by autograd.

The rows of an example's Fisher factor are A = Lᵀ J: one backward pass per column of the label factor L, which asks
autograd for the gradients at the outputs of layers only. A layer's rule (`layer_rules.py`, or `module_rule.py` for
everything else) makes the rows of its parameters from these and the layer's inputs.

Legend: B batch, C classes, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pipeline.fisher.capture import LogitsFunction, Use, frozen, repeat, watch
from pipeline.fisher.contributions import Contribution, Dense, add
from pipeline.fisher.errors import UnsupportedModelError
from pipeline.fisher.label_factor import exact_label_factor
from pipeline.fisher.layer_rules import per_example, rule_for
from pipeline.fisher.module_rule import ModuleCall, module_rows
from pipeline.fisher.owners import Owners, find_owners
from pipeline.fisher.parameters import ParameterLayout

_INDEPENDENT = (
    "the logits do not depend on the output of any module with selected parameters: do not detach them or compute them "
    "under torch.no_grad, or select other parameters"
)


@dataclass(frozen=True)
class Collected:
    """Logits, label factors and gradient rows of a batch. Parameters that the logits do not depend on are absent."""

    logits_BC: Tensor
    label_factors_BCR: Tensor
    """float64; zero for examples whose logits are not finite."""
    contributions: dict[str, Contribution]


@dataclass
class GradientCollector:
    """Collects the gradient rows of the parameters of `layout`, batch after batch.

    What is learnt once about the model is kept: which module accounts for which parameter, and which modules' outputs
    are shared by all examples. Batches may differ in size and length.
    """

    model: nn.Module
    logits_fn: LogitsFunction
    layout: ParameterLayout
    label_factor_fn: Callable[[Tensor], Tensor] = exact_label_factor
    _owners: Owners | None = field(default=None, init=False)
    _shared: frozenset[str] | None = field(default=None, init=False)

    def collect(self, batch: Any, n_examples: int | None = None) -> Collected:
        """Logits, label factors and every parameter's contribution to the rows of the batch.

        `n_examples` is taken from the first tensor in `batch` unless given. Raises UnsupportedModelError if the logits
        are not n_examples × C, or if a layer cannot be handled.
        """
        n_examples = _leading_size(batch) if n_examples is None else n_examples
        with frozen(self.model):
            if n_examples is None:
                with torch.no_grad():
                    n_examples = len(self._logits(batch, None))
            if self._owners is None:
                self._owners = find_owners(self.model, self.layout, lambda: self._logits(batch, n_examples))
            if self._shared is None and n_examples > 1:
                self._shared = self._find_shared(batch, n_examples)
            shared = self._shared or frozenset()
            logits, uses = self._watch(batch, n_examples, {name: n_examples for name in shared if n_examples > 1})
            label_factors = self._label_factors(logits.detach())
            deltas = _output_gradients(logits, uses, label_factors.movedim(2, 0))
            found: dict[str, list[Contribution]] = {}
            for use, delta in zip(uses, deltas, strict=True):
                for name, part in self._rows(use, delta, n_examples):
                    found.setdefault(name, []).append(part)
        if not found:
            raise UnsupportedModelError(_INDEPENDENT)
        contributions = {name: add(found[name]) for name in self.layout.names if name in found}
        return Collected(logits.detach(), label_factors, contributions)

    def _logits(self, batch: Any, n_examples: int | None) -> Tensor:
        logits = self.logits_fn(self.model, batch)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(f"logits must be a tensor of examples x classes, not {type(logits).__name__}")
        if logits.dim() != 2 or logits.shape[1] < 2 or n_examples not in (None, logits.shape[0]):
            expected = "examples" if n_examples is None else f"{n_examples} examples"
            raise UnsupportedModelError(
                f"logits must be of shape {expected} x classes, with at least 2 classes, but are {tuple(logits.shape)}"
            )
        return logits

    def _watch(self, batch: Any, n_examples: int, shared: Mapping[str, int]) -> tuple[Tensor, list[Use]]:
        assert self._owners is not None
        modules = {name: self.model.get_submodule(name) for name in self._owners}
        general = {name for name, module in modules.items() if rule_for(module, self._owners[name]) is None}
        with watch(modules, general, shared) as uses:
            try:
                logits = self._logits(batch, n_examples)
            except (RuntimeError, UnsupportedModelError) as error:
                if not shared or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UnsupportedModelError(
                    f"examples are not on the first axis of the output of {', '.join(sorted(shared))}: "
                    "put them there (batch_first=True), or exclude these modules with parameters.exclude"
                ) from error
        if not logits.requires_grad:
            raise UnsupportedModelError(_INDEPENDENT)
        return logits, uses

    def _find_shared(self, batch: Any, n_examples: int) -> frozenset[str]:
        """Modules whose output does not have the examples on its first axis, and so serves all of them at once.

        Found by asking which part of the output the logits of the first, and of the last, example depend on.
        """
        logits, uses = self._watch(batch, n_examples, {})
        probes = logits.new_zeros(2, *logits.shape)
        probes[0, 0] = probes[1, -1] = torch.linspace(1, 2, logits.shape[1])
        shared = set()
        for use, deltas in zip(uses, _output_gradients(logits, uses, probes), strict=True):
            if use.outputs or deltas[0] is None:
                continue  # the general rule finds the axis itself
            delta = deltas[0]
            if delta.shape[1] % n_examples:
                shared.add(use.module_name)
                continue
            # nan > 0 is false: an example that is not finite says nothing
            live_2B = delta.unflatten(1, (n_examples, -1)).flatten(2).abs().gt(0).any(2)
            if live_2B[0, 1:].any() or live_2B[1, :-1].any():
                shared.add(use.module_name)
        return frozenset(shared)

    def _label_factors(self, logits_BC: Tensor) -> Tensor:
        finite_B = logits_BC.isfinite().all(1)
        factors_BCR = self.label_factor_fn(logits_BC.where(finite_B[:, None], 0))
        return factors_BCR.where(finite_B[:, None, None], 0)

    def _rows(self, use: Use, deltas: tuple[Tensor | None, ...], n_examples: int) -> Iterator[tuple[str, Contribution]]:
        assert self._owners is not None
        wanted = self._owners[use.module_name]
        if all(delta is None for delta in deltas):
            return
        use.check_inputs()
        rule = rule_for(use.module, wanted)
        if rule is None:
            parts = self._general_rows(use, deltas, n_examples)
        else:
            (delta,) = deltas
            assert delta is not None
            args, kwargs = use.inputs
            inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
            if use.shared:
                inputs = repeat(inputs, n_examples)
            delta = per_example(delta.movedim(0, -1), n_examples).movedim(-1, 2)
            inputs = per_example(inputs, n_examples)
            parts = rule(use.module, _accurate(inputs), _accurate(delta), frozenset(wanted))
        for name, part in parts.items():
            yield wanted[name], part

    def _general_rows(self, use: Use, deltas: tuple[Tensor | None, ...], n_examples: int) -> dict[str, Contribution]:
        assert self._owners is not None
        live = [place for place, delta in enumerate(deltas) if delta is not None]
        call = ModuleCall(
            use.module,
            use.inputs,
            tuple(use.places[place] for place in live),
            tuple(use.outputs[place] for place in live),
            tuple(delta for delta in deltas if delta is not None),
        )
        own = dict(use.module.named_parameters(remove_duplicate=False))
        parameters = {name: own[name].detach() for name in self._owners[use.module_name]}
        rows = module_rows(call, parameters, n_examples)
        return {name: Dense(_accurate(value)) for name, value in rows.items()}


def _output_gradients(logits: Tensor, uses: Sequence[Use], directions: Tensor) -> list[tuple[Tensor | None, ...]]:
    """For each use and each of its outputs, (n, *output shape): gradients of ⟨direction, logits⟩, None if all zero.

    directions (n, B, C): one backward pass each.
    """
    edges = [edge for use in uses for edge in use.edges]
    passes = []
    for place, direction in enumerate(directions.to(logits.dtype)):
        retain = place + 1 < len(directions)
        passes.append(torch.autograd.grad(logits, edges, direction, retain_graph=retain, allow_unused=True))
    # an output that the logits do not depend on is absent from every pass alike
    stacked = iter([None if column[0] is None else torch.stack(column) for column in zip(*passes, strict=True)])
    return [tuple(next(stacked) for _ in use.edges) for use in uses]


def _accurate(value: Tensor) -> Tensor:
    """Half precision is widened before sums are taken over positions."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _leading_size(batch: Any) -> int | None:
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
