"""Forward passes in which the calls of the modules that own parameters are watched."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from npeff.gradients.calls import output_gradients
from npeff.gradients.capture import Axes, Place, Use, called_modules, watch
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.experts import opened, stacks
from npeff.gradients.hidden_state import StateReader
from npeff.gradients.layer_rules import rule_for
from npeff.gradients.owners import Owners, find_owners, layout_names, move_up, with_new_places, without_owner
from npeff.gradients.parameter_uses import ParameterUses
from npeff.gradients.parameters import ParameterLayout
from npeff.gradients.steering import Unknown

INDEPENDENT = (
    "the logits do not depend on the output of any module with selected parameters: do not detach them or compute them "
    "under torch.no_grad, or select other parameters"
)


@dataclass(frozen=True)
class Pass:
    """A forward pass over a batch."""

    logits: Tensor
    uses: list[Use]
    outside: frozenset[str]
    """Parameters that were used while no module that owns them was called."""
    steering: int
    """Hash of what decided where the entries of the first axis went, see `steering.py`."""
    axes: Axes

    @property
    def evidence(self) -> frozenset[Hashable]:
        """What the model did in this pass: which modules it called, with which forms of outputs, and which parameters
        it used outside their modules. All of it applies to batches with the same steering only."""
        alone = self.axes.n_examples == 1
        called = {(use.module_name, use.forms, alone, self.steering) for use in self.uses}
        return frozenset(called | {("outside", name, alone, self.steering) for name in self.outside})


@dataclass
class Watcher:
    """Watches one forward pass after another.

    The watcher stores which module owns which parameter, and which outputs all examples share. It finds both again when
    a pass does something new: it calls other modules, uses other parameters, or an output has another form.
    """

    model: nn.Module
    layout: ParameterLayout
    owners: Owners = field(default_factory=dict, init=False)
    _idle: dict[str, nn.Module] | None = field(default=None, init=False)
    """Modules with parameters of the layout that have no owner yet. None before the first pass."""
    _unused: set[str] = field(default_factory=set, init=False)
    """Parameters without an owner that a pass has used, although its logits do not depend on them."""
    _stored: set[str] = field(default_factory=set, init=False)
    """Owners that were called in one pass over a batch and not in the next pass over the same batch."""
    _known: set[Place] = field(default_factory=set, init=False)
    _shared: set[Place] = field(default_factory=set, init=False)
    """The outputs among `_known` that all examples share."""
    _apart: dict[Place, frozenset[int]] = field(default_factory=dict, init=False)
    """The axes along which the examples of an output are apart."""

    def forward(self, run: Callable[[], Tensor], axes: Axes) -> Pass:
        """Run the model on a batch.

        Args:
            run: Function that computes the logits of the batch.
            axes: Sizes of the batch.
        """
        if self._stored:
            raise UnsupportedModelError(_stored(self._stored))
        if self._idle is None:
            self.update_owners(run)
        assert self._idle is not None
        found = None
        with called_modules(self._idle) as called:
            try:
                found = self._forward(run, axes)
            except UnsupportedModelError:
                if not called:
                    raise
        new = set() if found is None else found.outside - self._owned() - self._unused
        if found is not None and not called and not new:
            return found
        self.update_owners(run)
        self._unused |= new - self._owned()
        return self._forward(run, axes)

    def example_axes(self, use: Use) -> tuple[frozenset[int] | None, ...]:
        """Return the axes that may hold the examples, for each output of a use. None if nothing is known."""
        if use.shared:
            return tuple(frozenset((0,)) if place in self._shared else None for place in use.outputs_by_form)
        return tuple(self._apart.get(place) for place in use.outputs_by_form)

    def update_owners(self, run: Callable[[], Tensor]) -> None:
        """Find the owners of parameters that have none yet.

        Raises:
            UnsupportedModelError: A second pass over the batch does not call a new owner.
        """
        found = find_owners(self.model, self.layout, run)
        with called_modules({name: self.model.get_submodule(name) for name in found}) as called, torch.no_grad():
            run()
        self._stored |= set(found) - called
        if self._stored:
            raise UnsupportedModelError(_stored(self._stored))
        self.owners = with_new_places(self.owners, found)
        self._idle = without_owner(self.model, self.layout, self.owners)
        self._known.clear()

    def update_shared(self, run: Callable[[], Tensor], axes: Axes) -> None:
        """Find the outputs of modules that have no axis of examples, so that all examples share them.

        If the model fails when such an output is repeated for each example (T5 permutes the axes of its position bias),
        the nearest called module above becomes the owner of the parameters.
        """
        while True:
            shared, seen = self._shared_outputs(run, axes)
            refused = []
            for name in sorted({name for name, *_ in shared}):
                try:
                    self._watch(run, {place for place in shared if place[0] == name}, axes)
                except UnsupportedModelError:
                    refused.append(name)
            if not refused:
                self._known |= seen
                self._shared = (self._shared - seen) | shared
                return
            self.owners = move_up(self.model, self.owners, refused, run)

    def _owned(self) -> set[str]:
        return {name for own in self.owners.values() for name in own.values()}

    def _forward(self, run: Callable[[], Tensor], axes: Axes) -> Pass:
        if axes.n_examples == 1:
            return self._watch(run, frozenset(), axes)
        try:
            found = self._watch(run, self._shared, axes)
            if {place for use in found.uses for place in use.outputs_by_form} <= self._known:
                return found
        except UnsupportedModelError:
            pass  # an output may be shared in this batch, and not in former ones
        self.update_shared(run, axes)
        found = self._watch(run, self._shared, axes)
        self._known |= {place for use in found.uses for place in use.outputs_by_form}  # after repeated outputs
        return found

    def _watch(self, run: Callable[[], Tensor], shared: Set[Place], axes: Axes) -> Pass:
        modules = {name: self.model.get_submodule(name) for name in self.owners}
        general = {name for name, module in modules.items() if rule_for(module, self.owners[name]) is None}
        n_experts = {module.get_parameter(name).shape[0] for module, (name, _) in self._layers_of_experts.items()}
        mode = ParameterUses(self._owners_by_id(), axes.n_examples, n_experts)
        # torch.compile would trace the mode, so nothing is known about the functions that a compiled model calls
        following = nullcontext() if self._is_compiled else mode.following(modules)
        before = None if axes.n_examples == 1 else self._state.read()
        with (
            opened(self._layers_of_experts) as routed,
            watch(modules, general, shared, axes, routed) as uses,
            following,
        ):
            try:
                logits = run()
            except (RuntimeError, ValueError, IndexError) as error:
                if not shared or isinstance(error, torch.OutOfMemoryError):
                    raise
                raise UnsupportedModelError(_not_first(name for name, *_ in shared)) from error
        if not logits.requires_grad:
            raise UnsupportedModelError(INDEPENDENT)
        seen: tuple[Hashable, ...] = ()
        if axes.n_examples > 1:
            incomparable = self._is_compiled or before != self._state.read()
            seen = (*mode.steering, *[Unknown()] * incomparable, axes.given)
        return Pass(logits, uses, frozenset(mode.outside), hash(seen), axes)

    @cached_property
    def _state(self) -> StateReader:
        return StateReader(self.model)

    @cached_property
    def _layers_of_experts(self) -> dict[nn.Module, tuple[str, str]]:
        if self._is_compiled:
            return {}
        return {module: names for module in self.model.modules() if (names := stacks(module)) is not None}

    @cached_property
    def _is_compiled(self) -> bool:
        modules = self.model.modules()
        return any(type(each).__name__ == "OptimizedModule" or each._compiled_call_impl is not None for each in modules)

    def _owners_by_id(self) -> dict[int, tuple[str, frozenset[str]]]:
        places: dict[str, set[str]] = {}
        for module, own in self.owners.items():
            for name in own.values():
                places.setdefault(name, set()).add(module)
        return {
            id(parameter): (name, frozenset(places.get(name, ())))
            for parameter, name in layout_names(self.model, self.layout)
        }

    def _shared_outputs(self, run: Callable[[], Tensor], axes: Axes) -> tuple[set[Place], set[Place]]:
        """Find the shared outputs by comparing the gradients of the first and of the last example's logits.

        Returns:
            The shared outputs, and all outputs.
        """
        found = self._watch(run, frozenset(), axes)
        logits, n_examples = found.logits.detach(), axes.n_examples
        probes = (_probe(logits, 0), _probe(logits, -1))
        shared, seen = set(), set()
        passes = output_gradients(found.logits, [use.edges for use in found.uses], probes)
        for use, outputs in zip(found.uses, passes, strict=True):
            for place, gradients in zip(use.outputs_by_form, outputs, strict=True):
                seen.add(place)
                if gradients is None:
                    continue
                first, last = gradients
                apart = [axis for axis in range(first.dim()) if _separates(axis, first, last, n_examples)]
                if apart and all(part.abs().gt(0).any() for part in gradients):
                    possible = frozenset(apart)
                    self._apart[place] = self._apart.get(place, possible) & possible or possible
                if apart and (apart[0] == 0 or use.outputs):  # the general rule accepts examples on any axis
                    continue
                if apart and all(part.abs().gt(0).any() for part in gradients):
                    raise UnsupportedModelError(_not_first([use.module_name]))
                shared.add(place)
        return shared, seen


def _separates(axis: int, first: Tensor, last: Tensor, n_examples: int) -> bool:
    """Return whether the gradients of the first and of the last example are confined to their parts of an axis."""
    if first.shape[axis] % n_examples:
        return False
    # nan > 0 is false, so an example that is not finite has no effect on the result
    parts = [value.unflatten(axis, (n_examples, -1)).movedim(axis, 0).flatten(1) for value in (first, last)]
    live_2B = [part.abs().gt(0).any(1) for part in parts]
    return not (live_2B[0][1:].any() or live_2B[1][:-1].any())


def _stored(module_names: Iterable[str]) -> str:
    return (
        f"a second pass over the same batch does not call {', '.join(map(repr, sorted(module_names)))}: the model "
        "stores the output of this module, or skips the module at random: compute it in every pass, or exclude its "
        "parameters with parameters.exclude"
    )


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
