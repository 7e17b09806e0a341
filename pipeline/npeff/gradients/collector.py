"""Per-example gradient rows of a model, without a weight gradient ever being formed by autograd.

The rows of an example's Fisher factor are gradients of ⟨direction, logits⟩ (`labels.py`): one backward pass for each
direction, which asks autograd for the gradients at the outputs of layers only. A layer's rule (`layer_rules.py`, or
`module_rule.py` for everything else) makes the rows of its parameters from these and the layer's inputs.

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
"""The gradients at one output of a module, one tensor of its shape for each direction."""


@dataclass(frozen=True)
class Collected:
    """Logits, label directions and gradient rows of a batch. Parameters that the logits do not depend on are absent."""

    logits: Tensor
    """(B, C) or (B, T, C)."""
    labels: LabelRows
    contributions: dict[str, Contribution]
    """The rows, which are divided by `labels.scales_B`, as the directions are."""


@dataclass(frozen=True)
class WatchedCall:
    """One call of a module that accounts for parameters, and the gradients at its outputs."""

    use: Use
    deltas: tuple[_Rows | None, ...]
    """For each of its floating-point outputs; None where the logits do not depend on it. At least one is there."""
    names: Mapping[str, str]
    """{a parameter's name within the module: its name in the layout}"""

    @property
    def rule(self) -> Rule | None:
        """The layer's own rule, None where the general one is to be taken."""
        return rule_for(self.use.module, self.names)

    @property
    def module_call(self) -> ModuleCall:
        """The call as the general rule takes it: only with the outputs that have a gradient."""
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
        """Those it accounts for, by name within the module."""
        own = dict(self.use.module.named_parameters(remove_duplicate=False))
        return {name: own[name].detach() for name in self.names}


@dataclass(frozen=True)
class Watched:
    """A batch's logits and label directions, and the calls that its rows are made from."""

    logits: Tensor
    """(B, C) or (B, T, C)."""
    labels: LabelRows
    calls: list[WatchedCall]
    n_examples: int


@dataclass
class GradientCollector:
    """Collects the gradient rows of the parameters of `layout`, batch after batch.

    What is learnt about the model is kept: which module accounts for which parameter, and which outputs of modules are
    shared by all examples; more of it when a batch calls modules that none before did. Batches may differ in size and
    length.
    """

    model: nn.Module
    logits_fn: LogitsFunction
    layout: ParameterLayout
    labels: LabelSpec = field(default_factory=LabelSpec)
    _owners: Owners | None = field(default=None, init=False)
    _idle: dict[str, nn.Module] = field(default_factory=dict, init=False)
    """Modules with parameters of the layout that no batch called so far."""
    _shared: frozenset[Place] = field(default=frozenset(), init=False)
    _shared_known: bool = field(default=False, init=False)

    def collect(
        self, batch: Any, examples: Sequence[int] | int | None = None, targets: Tensor | None = None
    ) -> Collected:
        """Logits, label directions and every parameter's contribution to the rows of the batch.

        Args:
            examples: the examples' numbers in the data set (0, 1, … unless given), or how many they are; that is taken
                from the first tensor in `batch` unless given.
            targets: as of `label_rows`.

        Raises UnsupportedModelError if the logits are not B×C or B×T×C, the targets do not fit, or a layer cannot be
        handled.
        """
        with frozen(self.model):
            watched = self.watched(batch, examples, targets)
            accurate = _Accurate()
            found: dict[str, list[Contribution]] = {}
            for call in watched.calls:
                for name, part in _rows(call, watched.n_examples, accurate).items():
                    found.setdefault(name, []).append(part)
        contributions = {name: add(found[name]) for name in self.layout.names if name in found}
        return Collected(watched.logits, watched.labels, contributions)

    def watched(
        self, batch: Any, examples: Sequence[int] | int | None = None, targets: Tensor | None = None
    ) -> Watched:
        """The forward pass and the backward passes of `collect`, whose arguments these are, without the rows.

        To be called inside `frozen(model)`, in which the calls are looked at too. Raises as `collect` does.
        """
        numbers = range(examples) if isinstance(examples, int) else examples
        run, n_examples = self._run(batch, numbers, targets)
        if self._owners is None:
            self._learn(run)
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

    def learn(self, batch: Any, examples: Sequence[int], targets: Tensor | None = None) -> None:
        """What `collect` learns of the model from its first batch, and no rows: two examples are enough.

        Raises as `collect` does.
        """
        with frozen(self.model):
            run, n_examples = self._run(batch, examples, targets)
            self._learn(run)
            self._know_shared(run, n_examples)

    def _run(
        self, batch: Any, numbers: Sequence[int] | None, targets: Tensor | None
    ) -> tuple[Callable[[], Tensor], int]:
        """What computes the logits of a batch, and how many examples it has."""
        n_examples = _leading_size(batch) if numbers is None else len(numbers)
        n_axes = 2 if targets is None else targets.dim() + 1
        if n_examples is None:
            with torch.no_grad():
                n_examples = len(self._logits(batch, None, n_axes))
        return partial(self._logits, batch, n_examples, n_axes), n_examples

    def replica(self) -> GradientCollector:
        """One of a copy of the modules with the same parameters; it learns for itself.

        Inside `frozen` both may collect at the same time, if `has_rules` is true.
        """
        parameters = {id(parameter): parameter for parameter in self.model.parameters()}
        return GradientCollector(copy.deepcopy(self.model, parameters), self.logits_fn, self.layout, self.labels)

    @property
    def has_rules(self) -> bool:
        """Whether every module with parameters of the layout, or that accounts for some, has a rule of its own.

        `module_rows`, which stands in for a missing one, changes settings of the whole process for a while.
        """
        places = self._owners or {}
        own = without_owner(self.model, self.layout, {})
        modules = dict(self.model.named_modules())
        return all(rule_for(modules[name], places[name]) is not None for name in places) and all(
            rule_for(module, dict(module.named_parameters(recurse=False))) is not None for module in own.values()
        )

    def _learn(self, run: Callable[[], Tensor]) -> None:
        """Which module accounts for which parameter, from a batch that calls modules which none before did."""
        self._owners = with_new_places(self._owners or {}, find_owners(self.model, self.layout, run))
        self._idle = without_owner(self.model, self.layout, self._owners)
        self._shared_known = False

    def _forward(self, run: Callable[[], Tensor], n_examples: int) -> tuple[Tensor, list[Use]]:
        with called_modules(self._idle) as called:
            try:
                found = self._watch_known(run, n_examples)
            except UnsupportedModelError:
                if not called:
                    raise
        if not called:
            return found
        self._learn(run)
        return self._watch_known(run, n_examples)

    def _watch_known(self, run: Callable[[], Tensor], n_examples: int) -> tuple[Tensor, list[Use]]:
        self._know_shared(run, n_examples)
        return self._watch(run, self._shared if n_examples > 1 else frozenset(), n_examples)

    def _know_shared(self, run: Callable[[], Tensor], n_examples: int) -> None:
        if n_examples > 1 and not self._shared_known:
            self._shared |= self._find_shared(run, n_examples)
            self._shared_known = True

    def _logits(self, batch: Any, n_examples: int | None, n_axes: int) -> Tensor:
        logits = self.logits_fn(self.model, batch)
        if not isinstance(logits, Tensor):
            raise UnsupportedModelError(f"logits must be a tensor of examples x classes, not {type(logits).__name__}")
        if logits.dim() != n_axes or logits.shape[-1] < 2 or n_examples not in (None, logits.shape[0]):
            expected = "examples" if n_examples is None else f"{n_examples} examples"
            positions = "" if n_axes == 2 else " x positions"
            hint = " (only with targets() may they have positions too)" if (logits.dim(), n_axes) == (3, 2) else ""
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
        """Outputs of modules that do not have the examples on an axis, and so serve all of them at once.

        Where the model does not take an output that is repeated for each example (T5 permutes the axes of its position
        bias), the module above accounts for the parameters.
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
        """Found by asking which part of an output the logits of the first, and of the last, example depend on."""
        logits, uses = self._watch(run, frozenset(), n_examples)
        probes = (_probe(logits.detach(), 0), _probe(logits.detach(), -1))
        shared = set()
        for use, outputs in zip(uses, _output_gradients(logits, uses, probes), strict=True):
            for place, gradients in zip(use.places, outputs, strict=True):
                if gradients is None:
                    continue
                first, last = gradients
                axes = [axis for axis in range(first.dim()) if _separates(axis, first, last, n_examples)]
                if axes and (axes[0] == 0 or use.outputs):  # the general rule takes them from any axis
                    continue
                if axes and all(part.abs().gt(0).any() for part in gradients):
                    raise UnsupportedModelError(_not_first([use.module_name]))
                shared.add((use.module_name, place))
        return frozenset(shared)


def _rows(call: WatchedCall, n_examples: int, accurate: _Accurate) -> dict[str, Contribution]:
    """The contributions of a call of a module, by the parameters' names in the layout."""
    use, rule = call.use, call.rule
    if rule is None:
        general = module_rows(call.module_call, call.parameters, n_examples)
        return {call.names[name]: Dense(_accurate(value)) for name, value in general.items()}
    (delta,) = call.deltas
    assert delta is not None
    args, kwargs = use.inputs
    inputs: Tensor = args[0] if args else next(iter(kwargs.values()))
    if use.shared:
        inputs = repeat(inputs, n_examples)
    with torch.no_grad():
        inputs = per_example(accurate(inputs), n_examples)
        rows = [_accurate(per_example(row, n_examples)) for row in delta]
        parts = rule(use.module, inputs, rows, frozenset(call.names))
    return {call.names[name]: part for name, part in parts.items()}


def _output_gradients(
    logits: Tensor, uses: Sequence[Use], directions: Sequence[Tensor]
) -> list[tuple[_Rows | None, ...]]:
    """For each use and each of its outputs, the gradients of ⟨direction, logits⟩; None if all are zero.

    directions of the logits' shape: one backward pass each.
    """
    edges = [edge for use in uses for edge in use.edges]
    passes = []
    for row in range(len(directions)):
        retain = row + 1 < len(directions)
        passes.append(torch.autograd.grad(logits, edges, directions[row], retain_graph=retain, allow_unused=True))
    # an output that the logits do not depend on is absent from every pass alike
    columns = iter([None if column[0] is None else column for column in zip(*passes, strict=True)])
    return [tuple(next(columns) for _ in use.edges) for use in uses]


def _separates(axis: int, first: Tensor, last: Tensor, n_examples: int) -> bool:
    """Whether gradients of the first and of the last example are each confined to their own part of an axis."""
    if first.shape[axis] % n_examples:
        return False
    # nan > 0 is false: an example that is not finite says nothing
    parts = [value.unflatten(axis, (n_examples, -1)).movedim(axis, 0).flatten(1) for value in (first, last)]
    live_2B = [part.abs().gt(0).any(1) for part in parts]
    return not (live_2B[0][1:].any() or live_2B[1][:-1].any())


def _not_first(module_names: Iterable[str]) -> str:
    return (
        f"examples are not on the first axis of the output of {', '.join(sorted(module_names))}: "
        "put them there (batch_first=True), or exclude these modules with parameters.exclude"
    )


def _probe(logits: Tensor, example: int) -> Tensor:
    """A direction in the logits of one example."""
    direction = torch.zeros_like(logits)
    direction[example] = torch.linspace(1, 2, logits.shape[-1]).to(logits)
    return direction


def _accurate(value: Tensor) -> Tensor:
    """Half precision is widened before sums are taken over positions."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


class _Accurate:
    """`_accurate`, giving one result for one tensor: layers that read the same inputs are seen to do so."""

    def __init__(self) -> None:
        self._widened: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def __call__(self, value: Tensor) -> Tensor:
        key = value.data_ptr(), value.shape, value.stride(), value.dtype
        if key not in self._widened:
            self._widened[key] = (value, _accurate(value))
        return self._widened[key][1]


def _leading_size(batch: Any) -> int | None:
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)
