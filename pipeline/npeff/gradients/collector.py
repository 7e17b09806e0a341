"""Per-example gradient rows of a model. Autograd never forms a weight gradient.

The rows of an example's Fisher factor are gradients of ⟨direction, logits⟩ (`labels.py`). Each direction takes one
backward pass, which computes only the gradients at the outputs of layers. The rule of a layer (`layer_rules.py`, or
`module_rule.py` for all other modules) computes the rows of the layer's parameters from these gradients and the
layer's inputs.

Legend: B batch, C classes, R rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from npeff.gradients.calls import CachedWidening, Collected, WatchedCall, call_rows, output_gradients
from npeff.gradients.capture import Axes, LogitsFunction, frozen
from npeff.gradients.contribution import Contribution
from npeff.gradients.coverage import check_independent, made_logits, why_wrong, wrong_parameters
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.joined import joined_contributions, joined_labels, padded
from npeff.gradients.labels import LabelRows, label_rows
from npeff.gradients.layer_rules import rule_for
from npeff.gradients.owners import without_owner
from npeff.gradients.parameters import ParameterLayout
from npeff.gradients.sums import add
from npeff.gradients.watcher import INDEPENDENT, Pass, Watcher
from npeff.options.labels import LabelSpec

CHECKED_EVERY = 128
"""One of so many batches is checked although the model does nothing new, from a random one on. A check takes less time
than a batch."""
_MOST_TRUSTED = 100_000
"""Limit of the memory for what checked batches did. Only models that do something new in every batch reach it."""
_MAX_IRREGULAR = 3
"""Number of batches with wrong rows after which every batch is computed one example at a time."""


@dataclass(frozen=True)
class Watched:
    """The logits and label directions of a batch, and the module calls from which the rows are computed."""

    logits: Tensor
    """(B, C) or (B, T, C)."""
    labels: LabelRows
    calls: list[WatchedCall]
    n_examples: int
    run: Callable[[], Tensor]
    """Function that computes the logits of the batch."""
    forward: Pass
    """The pass. Its autograd graph is freed."""

    @property
    def precision(self) -> torch.dtype:
        """The lowest precision of the logits and of the outputs of modules."""
        kinds = {self.logits.dtype, *(call.use.dtype for call in self.calls)}
        return max((kind for kind in kinds if kind.is_floating_point), key=lambda kind: torch.finfo(kind).eps)


@dataclass
class GradientCollector:
    """Collects the gradient rows of the parameters of `layout` for one batch after another.

    Batches may differ in size and length. The rows of the first batch are compared with an ordinary backward pass, and
    so are those of every later batch in which the model does something that it did in no checked batch: it calls
    another module, an output has another form, or a parameter is used outside its module. One of `CHECKED_EVERY` other
    batches is checked, too. A batch whose rows cannot be computed, or are wrong, is computed one example at a time.
    """

    model: nn.Module
    logits_fn: LogitsFunction
    layout: ParameterLayout
    labels: LabelSpec = field(default_factory=LabelSpec)
    one: Callable[[int], tuple[Any, Tensor | None]] | None = None
    """Function that returns the batch with one example, given the number of the example, and its targets. If None,
    batches that need it are refused."""
    _watcher: Watcher = field(init=False)
    _trusted: set[Hashable] = field(default_factory=set, init=False)
    """What the model did in batches whose rows are right, see `Pass.evidence`."""
    _next_check: int | None = field(default=None, init=False)
    """Number of batches until the next check of a batch in which the model does nothing new."""
    n_irregular: int = field(default=0, init=False)
    """Number of batches that were computed one example at a time."""

    def __post_init__(self) -> None:
        self._watcher = Watcher(self.model, self.layout)

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
            UnsupportedModelError: The logits are not B×C or B×T×C, the targets do not fit the logits, a layer is not
                supported, or rows are not the gradient of their parameter.
        """
        numbers = range(examples) if isinstance(examples, int) else examples
        with frozen(self.model):
            if self.one is None or numbers is None or len(numbers) < 2:
                return self._collect(batch, numbers, targets)
            if self.n_irregular < _MAX_IRREGULAR:
                try:
                    return self._collect(batch, numbers, targets)
                except UnsupportedModelError:
                    pass
            collected = self._one_by_one(batch, numbers, targets)
            self.n_irregular += 1
            return collected

    def _collect(self, batch: Any, numbers: Sequence[int] | None, targets: Tensor | None) -> Collected:
        watched = self.watched(batch, numbers, targets)
        widen = CachedWidening()
        found: dict[str, list[Contribution]] = {}
        for call in watched.calls:
            for name, part in call_rows(call, watched.n_examples, widen).items():
                found.setdefault(name, []).append(part)
        contributions = {name: add(found[name]) for name in self.layout.names if name in found}
        collected = Collected(watched.logits, watched.labels, contributions)
        self._check(watched, collected, numbers, targets)
        return collected

    def _check(
        self, watched: Watched, collected: Collected, numbers: Sequence[int] | None, targets: Tensor | None
    ) -> None:
        """Compare the rows with an ordinary backward pass, if the model did something new or the batch is drawn.

        The logits of a drawn example of such a batch are compared with those of the example alone.

        Raises:
            UnsupportedModelError: The rows of a parameter are wrong, or the logits of the example differ.
        """
        evidence, seed = watched.forward.evidence, crc32(str(numbers[0] if numbers else 0).encode())
        if self._next_check is None:
            self._next_check = seed % CHECKED_EVERY + 1
        self._next_check -= 1
        if evidence <= self._trusted and self._next_check > 0:
            return
        if self._next_check <= 0:
            self._next_check = CHECKED_EVERY
        with torch.no_grad():
            wrong = wrong_parameters(self.model, self.layout, watched.run, collected, watched.precision, seed)
        if wrong:
            outside = wrong[0] in watched.forward.outside
            raise UnsupportedModelError(why_wrong(self.model, watched.run, wrong[0], outside, watched.n_examples))
        if self.one is not None and numbers is not None and len(numbers) > 1:
            self._check_one(watched, numbers, targets, seed)
        if wrong is not None:
            self._trusted |= evidence if len(self._trusted) < _MOST_TRUSTED else frozenset()

    def _check_one(self, watched: Watched, numbers: Sequence[int], targets: Tensor | None, seed: int) -> None:
        """Compare the logits of one example, drawn with `seed`, with those of this example alone.

        Raises:
            UnsupportedModelError: The logits differ: they depend on the other examples.
        """
        assert self.one is not None
        drawn = seed % len(numbers)
        with torch.no_grad():
            single, classes = self.one(numbers[drawn])
            alone = made_logits(self.logits_fn(self.model, single), classes)
            here = slice(drawn, drawn + 1)
            together = made_logits(watched.logits[here], None if targets is None else targets[here])
        check_independent(alone, together, together)

    def _one_by_one(self, batch: Any, numbers: Sequence[int], targets: Tensor | None) -> Collected:
        """Collect the rows of each example in a batch of its own, and join them.

        Raises:
            UnsupportedModelError: The rows of an example alone are wrong, too, or its logits differ from those in the
                batch.
        """
        assert self.one is not None
        parts, alone = [], []
        for number in numbers:
            single, classes = self.one(number)
            part = self._collect(single, [number], classes)
            parts.append(part)
            alone.append(made_logits(part.logits, classes))
        self._check_independent(torch.cat(alone), batch, targets)
        contributions = {
            name: joined_contributions([part.contributions.get(name) for part in parts])
            for name in self.layout.names
            if any(name in part.contributions for part in parts)
        }
        labels = joined_labels([part.labels for part in parts])
        return Collected(padded([part.logits for part in parts]), labels, contributions)

    def check_independence(self, batch: Any, examples: Sequence[int], targets: Tensor | None = None) -> None:
        """Compare the logits of a batch with those of each of its examples alone, which `one` returns.

        Raises:
            UnsupportedModelError: The logits of an example depend on the other examples, or are random.
        """
        assert self.one is not None
        with frozen(self.model), torch.no_grad():
            singles = [self.one(number) for number in examples]
            alone = [made_logits(self.logits_fn(self.model, single), classes) for single, classes in singles]
            self._check_independent(torch.cat(alone), batch, targets)

    @torch.no_grad()
    def _check_independent(self, alone: Tensor, batch: Any, targets: Tensor | None) -> None:
        together, again = (made_logits(self.logits_fn(self.model, batch), targets) for _ in range(2))
        check_independent(alone, together, again)

    def watched(
        self, batch: Any, examples: Sequence[int] | int | None = None, targets: Tensor | None = None
    ) -> Watched:
        """Run the forward pass and the backward passes of `collect` without computing the rows.

        Call this method, and use its result, inside `frozen(model)`. Arguments and exceptions are those of `collect`.
        """
        numbers = range(examples) if isinstance(examples, int) else examples
        run, axes = self._run(batch, numbers, targets)
        found = self._watcher.forward(run, axes)
        labels = label_rows(self.labels, found.logits.detach(), numbers, targets)
        calls = []
        gradients = output_gradients(found.logits, [use.all_edges for use in found.uses], labels.directions)
        for use, deltas in zip(found.uses, gradients, strict=True):
            if any(delta is not None for delta in deltas):
                use.check_inputs()
                own, n_outputs = self._watcher.owners[use.module_name], len(use.edges)
                apart = self._watcher.example_axes(use)
                calls.append(WatchedCall(use, deltas[:n_outputs], own, apart, deltas[n_outputs:]))
        if not calls:
            raise UnsupportedModelError(INDEPENDENT)
        return Watched(found.logits.detach(), labels, calls, axes.n_examples, run, found)

    def inspect(self, batch: Any, examples: Sequence[int], targets: Tensor | None = None) -> None:
        """Find the owners of parameters and the shared outputs, as `collect` does on its first batch.

        This method computes no rows. Two examples are enough. Arguments and exceptions are those of `collect`.
        """
        with frozen(self.model):
            self._watcher.forward(*self._run(batch, examples, targets))

    def _run(
        self, batch: Any, numbers: Sequence[int] | None, targets: Tensor | None
    ) -> tuple[Callable[[], Tensor], Axes]:
        """Return a function that computes the logits of a batch, and the sizes of the batch."""
        n_examples = _leading_size(batch) if numbers is None else len(numbers)
        n_axes = 2 if targets is None else targets.dim() + 1
        if n_examples is None:
            with torch.no_grad():
                n_examples = len(self._logits(batch, None, n_axes))
        return partial(self._logits, batch, n_examples, n_axes), Axes.of(batch, n_examples)

    def replica(self) -> GradientCollector:
        """Return a collector on a copy of the modules that shares the parameters of this one.

        The copy finds owners and shared outputs itself, and trusts what this collector has checked. Inside `frozen`,
        both collectors may run at the same time if `has_rules` is true.
        """
        parameters = {id(parameter): parameter for parameter in self.model.parameters()}
        model = copy.deepcopy(self.model, parameters)
        replica = GradientCollector(model, self.logits_fn, self.layout, self.labels, self.one)
        replica._trusted = self._trusted
        return replica

    @property
    def has_rules(self) -> bool:
        """Whether every module that holds or owns parameters of the layout has a layer rule.

        Modules without a layer rule use `module_rows`, which temporarily changes settings of the whole process.
        """
        places = self._watcher.owners
        own = without_owner(self.model, self.layout, {})
        modules = dict(self.model.named_modules())
        return all(rule_for(modules[name], places[name]) is not None for name in places) and all(
            rule_for(module, dict(module.named_parameters(recurse=False))) is not None for module in own.values()
        )

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


def _leading_size(batch: Any) -> int | None:
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), None)


def check_coverage(
    model: nn.Module,
    logits_fn: LogitsFunction,
    batch: Any,
    layout: ParameterLayout,
    *,
    labels: LabelSpec | None = None,
    examples: Sequence[int] | int | None = None,
    targets: Tensor | None = None,
) -> None:
    """Compare the collected rows of each parameter with one ordinary backward pass on a small batch.

    `GradientCollector.collect` does the same for the first batch, and for later batches in which the model does
    something that no checked batch did.

    Args:
        model: The model.
        logits_fn: Function that computes the logits of a batch.
        batch: Two or more examples.
        layout: The selected parameters.
        labels: See `GradientCollector`.
        examples: See `GradientCollector.collect`.
        targets: See `GradientCollector.collect`.

    Raises:
        UnsupportedModelError: The gradients of a parameter differ. The message names the first such parameter.
    """
    collected = GradientCollector(model, logits_fn, layout, labels or LabelSpec()).collect(batch, examples, targets)
    if not collected.logits.isfinite().all():
        raise UnsupportedModelError(
            "the logits of the examples used to check the model are not finite: check model and examples for NaN"
        )
