"""Per-example gradient rows of a model. Autograd never forms a weight gradient.

The rows of an example's Fisher factor are gradients of ⟨direction, logits⟩ (`labels.py`). Each direction takes one
backward pass, which computes only the gradients at the outputs of layers. The rule of a layer (`layer_rules.py`, or
`module_rule.py` for all other modules) computes the rows of the layer's parameters from these gradients and the
layer's inputs.

Legend: B batch, C classes, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from npeff.gradients.capture import LogitsFunction, Place, Use, called_modules, frozen, repeat, watch
from npeff.gradients.contribution import Contribution, Dense
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.labels import LabelRows, label_rows
from npeff.gradients.layer_rules import Rule, per_example, rule_for
from npeff.gradients.module_rule import ModuleCall, module_rows
from npeff.gradients.owners import Owners, find_owners, move_up, with_new_places, without_owner
from npeff.gradients.parameters import ParameterLayout
from npeff.gradients.sums import add
from npeff.options.labels import LabelSpec

_INDEPENDENT = (
    "the logits do not depend on the output of any module with selected parameters: do not detach them or compute them "
    "under torch.no_grad, or select other parameters"
)


_Rows = tuple[Tensor, ...]
"""The gradients at one output of a module: one tensor of the output's shape for each direction."""


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


@dataclass(frozen=True)
class WatchedCall:
    """One call of a module that owns parameters (see `owners.py`), and the gradients at the module's outputs."""

    use: Use
    deltas: tuple[_Rows | None, ...]
    """One entry per floating-point output; None where the logits do not depend on the output. At least one entry is
    not None."""
    names: Mapping[str, str]
    """Maps the name of a parameter within the module to its name in the layout."""

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
        )

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The parameters that the module owns, by name within the module."""
        own = dict(self.use.module.named_parameters(remove_duplicate=False))
        return {name: own[name].detach() for name in self.names}


@dataclass(frozen=True)
class Watched:
    """The logits and label directions of a batch, and the module calls from which the rows are computed."""

    logits: Tensor
    """(B, C) or (B, T, C)."""
    labels: LabelRows
    calls: list[WatchedCall]
    n_examples: int


@dataclass
class GradientCollector:
    """Collects the gradient rows of the parameters of `layout` for one batch after another.

    The collector stores which module owns which parameter and which module outputs all examples share. It updates
    these when a batch calls modules that no earlier batch called. Batches may differ in size and length.
    """

    model: nn.Module
    logits_fn: LogitsFunction
    layout: ParameterLayout
    labels: LabelSpec = field(default_factory=LabelSpec)
    _owners: Owners | None = field(default=None, init=False)
    _idle: dict[str, nn.Module] = field(default_factory=dict, init=False)
    """Modules with parameters of the layout that no batch has called yet."""
    _shared: frozenset[Place] = field(default=frozenset(), init=False)
    _shared_is_current: bool = field(default=False, init=False)

    def collect(
        self, batch: Any, examples: Sequence[int] | int | None = None, targets: Tensor | None = None
    ) -> Collected:
        """Compute the logits, the label directions and every parameter's contribution to the rows of a batch.

        Args:
            batch: Input of `logits_fn`.
            examples: The numbers of the examples in the data set, or the number of examples. By default the numbers
                are 0, 1, … and the number of examples is the size of the first tensor in `batch`.
            targets: See `label_rows`.

        Returns:
            The logits, label directions and gradient rows.

        Raises:
            UnsupportedModelError: The logits are not B×C or B×T×C, the targets do not fit the logits, or a layer is
                not supported.
        """
        with frozen(self.model):
            watched = self.watched(batch, examples, targets)
            widen = _CachedWidening()
            found: dict[str, list[Contribution]] = {}
            for call in watched.calls:
                for name, part in _rows(call, watched.n_examples, widen).items():
                    found.setdefault(name, []).append(part)
        contributions = {name: add(found[name]) for name in self.layout.names if name in found}
        return Collected(watched.logits, watched.labels, contributions)

    def watched(
        self, batch: Any, examples: Sequence[int] | int | None = None, targets: Tensor | None = None
    ) -> Watched:
        """Run the forward pass and the backward passes of `collect` without computing the rows.

        Call this method, and use its result, inside `frozen(model)`. Arguments and exceptions are those of `collect`.
        """
        numbers = range(examples) if isinstance(examples, int) else examples
        run, n_examples = self._run(batch, numbers, targets)
        if self._owners is None:
            self._update_owners(run)
        logits, uses = self._forward(run, n_examples)
        labels = label_rows(self.labels, logits.detach(), numbers, targets)
        assert self._owners is not None
        calls = []
        for use, deltas in zip(uses, _output_gradients(logits, uses, labels.directions), strict=True):
            if any(delta is not None for delta in deltas):
                use.check_inputs()
                calls.append(WatchedCall(use, deltas, self._owners[use.module_name]))
        if not calls:
            raise UnsupportedModelError(_INDEPENDENT)
        return Watched(logits.detach(), labels, calls, n_examples)

    def inspect(self, batch: Any, examples: Sequence[int], targets: Tensor | None = None) -> None:
        """Find the owners of parameters and the shared outputs, as `collect` does on its first batch.

        This method computes no rows. Two examples are enough. Arguments and exceptions are those of `collect`.
        """
        with frozen(self.model):
            run, n_examples = self._run(batch, examples, targets)
            self._update_owners(run)
            self._update_shared(run, n_examples)

    def _run(
        self, batch: Any, numbers: Sequence[int] | None, targets: Tensor | None
    ) -> tuple[Callable[[], Tensor], int]:
        """Return a function that computes the logits of a batch, and the number of examples in the batch."""
        n_examples = _leading_size(batch) if numbers is None else len(numbers)
        n_axes = 2 if targets is None else targets.dim() + 1
        if n_examples is None:
            with torch.no_grad():
                n_examples = len(self._logits(batch, None, n_axes))
        return partial(self._logits, batch, n_examples, n_axes), n_examples

    def replica(self) -> GradientCollector:
        """Return a collector on a copy of the modules that shares the parameters of this one.

        The copy finds owners and shared outputs itself. Inside `frozen`, both collectors may run at the same time if
        `has_rules` is true.
        """
        parameters = {id(parameter): parameter for parameter in self.model.parameters()}
        return GradientCollector(copy.deepcopy(self.model, parameters), self.logits_fn, self.layout, self.labels)

    @property
    def has_rules(self) -> bool:
        """Whether every module that holds or owns parameters of the layout has a layer rule.

        Modules without a layer rule use `module_rows`, which temporarily changes settings of the whole process.
        """
        places = self._owners or {}
        own = without_owner(self.model, self.layout, {})
        modules = dict(self.model.named_modules())
        return all(rule_for(modules[name], places[name]) is not None for name in places) and all(
            rule_for(module, dict(module.named_parameters(recurse=False))) is not None for module in own.values()
        )

    def _update_owners(self, run: Callable[[], Tensor]) -> None:
        """Find the owners of parameters with a batch that calls modules which no earlier batch called."""
        self._owners = with_new_places(self._owners or {}, find_owners(self.model, self.layout, run))
        self._idle = without_owner(self.model, self.layout, self._owners)
        self._shared_is_current = False

    def _forward(self, run: Callable[[], Tensor], n_examples: int) -> tuple[Tensor, list[Use]]:
        with called_modules(self._idle) as called:
            try:
                found = self._watch_with_shared(run, n_examples)
            except UnsupportedModelError:
                if not called:
                    raise
        if not called:
            return found
        self._update_owners(run)
        return self._watch_with_shared(run, n_examples)

    def _watch_with_shared(self, run: Callable[[], Tensor], n_examples: int) -> tuple[Tensor, list[Use]]:
        self._update_shared(run, n_examples)
        return self._watch(run, self._shared if n_examples > 1 else frozenset(), n_examples)

    def _update_shared(self, run: Callable[[], Tensor], n_examples: int) -> None:
        if n_examples > 1 and not self._shared_is_current:
            self._shared |= self._find_shared(run, n_examples)
            self._shared_is_current = True

    def _logits(self, batch: Any, n_examples: int | None, n_axes: int) -> Tensor:
        logits = self.logits_fn(self.model, batch)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(f"logits must be a tensor of examples x classes, not {type(logits).__name__}")
        if logits.dim() != n_axes or logits.shape[-1] < 2 or n_examples not in (None, logits.shape[0]):
            expected = "examples" if n_examples is None else f"{n_examples} examples"
            positions = "" if n_axes == 2 else " x positions"
            hint = " (logits with positions need targets())" if (logits.dim(), n_axes) == (3, 2) else ""
            raise UnsupportedModelError(
                f"logits must be of shape {expected}{positions} x classes, with at least 2 classes, but are "
                f"{tuple(logits.shape)}{hint}"
            )
        return logits

    def _watch(self, run: Callable[[], Tensor], shared: Set[Place], n_examples: int) -> tuple[Tensor, list[Use]]:
        assert self._owners is not None
        modules = {name: self.model.get_submodule(name) for name in self._owners}
        general = {name for name, module in modules.items() if rule_for(module, self._owners[name]) is None}
        with watch(modules, general, shared, n_examples) as uses:
            try:
                logits = run()
            except (RuntimeError, ValueError, IndexError) as error:
                if not shared or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UnsupportedModelError(_not_first(name for name, _ in shared)) from error
        if not logits.requires_grad:
            raise UnsupportedModelError(_INDEPENDENT)
        return logits, uses

    def _find_shared(self, run: Callable[[], Tensor], n_examples: int) -> frozenset[Place]:
        """Find the outputs of modules that have no axis of examples, so that all examples share them.

        If the model fails when such an output is repeated for each example (T5 permutes the axes of its position bias),
        the nearest called module above becomes the owner of the parameters.
        """
        while True:
            shared = self._shared_outputs(run, n_examples)
            refused = []
            for name in sorted({name for name, _ in shared}):
                try:
                    self._watch(run, {place for place in shared if place[0] == name}, n_examples)
                except UnsupportedModelError:
                    refused.append(name)
            if not refused:
                return shared
            assert self._owners is not None
            self._owners = move_up(self.model, self._owners, refused, run)

    def _shared_outputs(self, run: Callable[[], Tensor], n_examples: int) -> frozenset[Place]:
        """Find the shared outputs by comparing the gradients of the first and of the last example's logits."""
        logits, uses = self._watch(run, frozenset(), n_examples)
        probes = (_probe(logits.detach(), 0), _probe(logits.detach(), -1))
        shared = set()
        for use, outputs in zip(uses, _output_gradients(logits, uses, probes), strict=True):
            for place, gradients in zip(use.places, outputs, strict=True):
                if gradients is None:
                    continue
                first, last = gradients
                axes = [axis for axis in range(first.dim()) if _separates(axis, first, last, n_examples)]
                if axes and (axes[0] == 0 or use.outputs):  # the general rule accepts examples on any axis
                    continue
                if axes and all(part.abs().gt(0).any() for part in gradients):
                    raise UnsupportedModelError(_not_first([use.module_name]))
                shared.add((use.module_name, place))
        return frozenset(shared)


def _rows(call: WatchedCall, n_examples: int, widen: _CachedWidening) -> dict[str, Contribution]:
    """Return the contributions of one module call, by the names of the parameters in the layout."""
    use, rule = call.use, call.rule
    if rule is None:
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


def _output_gradients(
    logits: Tensor, uses: Sequence[Use], directions: Sequence[Tensor]
) -> list[tuple[_Rows | None, ...]]:
    """Compute the gradients of ⟨direction, logits⟩ at each output of each use; None if all are zero.

    The directions have the shape of the logits. Each direction takes one backward pass.
    """
    edges = [edge for use in uses for edge in use.edges]
    passes = []
    for row in range(len(directions)):
        retain = row + 1 < len(directions)
        passes.append(torch.autograd.grad(logits, edges, directions[row], retain_graph=retain, allow_unused=True))
    # autograd returns None in every pass for an output that the logits do not depend on
    columns = iter([None if column[0] is None else column for column in zip(*passes, strict=True)])
    return [tuple(next(columns) for _ in use.edges) for use in uses]


def _separates(axis: int, first: Tensor, last: Tensor, n_examples: int) -> bool:
    """Return whether the gradients of the first and of the last example are confined to their parts of an axis."""
    if first.shape[axis] % n_examples:
        return False
    # nan > 0 is false, so an example that is not finite has no effect on the result
    parts = [value.unflatten(axis, (n_examples, -1)).movedim(axis, 0).flatten(1) for value in (first, last)]
    live_2B = [part.abs().gt(0).any(1) for part in parts]
    return not (live_2B[0][1:].any() or live_2B[1][:-1].any())


def _not_first(module_names: Iterable[str]) -> str:
    return (
        f"examples are not on the first axis of the output of {', '.join(sorted(module_names))}: "
        "put examples on the first axis (batch_first=True), or exclude these modules with parameters.exclude"
    )


def _probe(logits: Tensor, example: int) -> Tensor:
    """Return a direction in logit space that is zero except in the logits of one example."""
    direction = torch.zeros_like(logits)
    direction[example] = torch.linspace(1, 2, logits.shape[-1]).to(logits)
    return direction


def _widened(value: Tensor) -> Tensor:
    """Convert half precision to float32, for accurate sums over positions."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


class _CachedWidening:
    """`_widened` with a cache, so that layers with the same input tensor also share the converted tensor."""

    def __init__(self) -> None:
        self._cache: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Tensor) -> Tensor:
        key = value.data_ptr(), value.shape, value.stride(), value.dtype
        if key not in self._cache:
            self._cache[key] = (value, _widened(value))
        return self._cache[key][1]


def _leading_size(batch: Any) -> int | None:
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
