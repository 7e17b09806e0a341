"""Hooks that record which modules a model calls, with which inputs, and where their outputs are in the autograd graph.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor as is_transformed
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree

from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.experts import RoutedCall
from npeff.gradients.layer_rules import linear, rule_for
from npeff.gradients.steering import given

LogitsFunction = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> logits (B, C)."""
Form = tuple[int, str | int]
"""Number of axes of an output, and its first axis relative to the batch. See `Axes.form`."""
Place = tuple[str, int, Form]
"""An output of a module: the name of the module, the position among the module's flattened outputs, and the form."""


@dataclass(frozen=True)
class Axes:
    """Sizes that the first axis of an output can have because of the sizes of the batch."""

    n_examples: int
    positions: frozenset[int] = frozenset()
    """Products of the sizes of the axes that follow the axis of examples in the tensors of the batch."""
    given: Hashable = ()
    """See `steering.given`."""

    @classmethod
    def of(cls, batch: Any, n_examples: int) -> Axes:
        shapes = [leaf.shape for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        sizes = {size for shape in shapes if shape[:1] == (n_examples,) for size in accumulate(shape[1:], mul)}
        return cls(n_examples, frozenset(sizes), given(batch, n_examples))

    def form(self, value: Tensor) -> Form:
        """Return the number of axes of an output, and a description of its first axis.

        The description does not depend on the sizes of the batch where they explain the size of the axis. Other sizes
        are part of the description as numbers: k where the axis has B·k entries, and -n where it has n entries, which
        are not a multiple of B. Such sizes are constants of the model, or depend on the values of the examples.
        """
        first = value.shape[0] if value.dim() else 1
        if self.n_examples == 1 or first == self.n_examples:
            return value.dim(), "examples"
        if first == 1:
            return value.dim(), "one"
        k, rest = divmod(first, self.n_examples)
        if rest == 0 and k in self.positions:
            return value.dim(), "examples x positions"
        if first in self.positions:
            return value.dim(), "positions"
        return value.dim(), k if rest == 0 else -first


@dataclass(frozen=True)
class Use:
    """One call of a watched module.

    `edges` are the autograd edges of the floating-point outputs, as the module returned them.
    """

    module_name: str
    module: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    versions: tuple[int, ...]
    places: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    edges: tuple[GradientEdge, ...]
    forms: tuple[Form, ...]
    shared: bool
    """Whether an output is repeated for each example. See `watch`."""
    dtype: torch.dtype
    """Precision of the first output."""
    routed: RoutedCall | None = None
    """What happened inside a layer of experts, if it was recorded."""

    @property
    def all_edges(self) -> tuple[GradientEdge, ...]:
        """The edges of the outputs, followed by those inside a layer of experts."""
        return self.edges if self.routed is None else self.edges + self.routed.edges

    @property
    def outputs_by_form(self) -> tuple[Place, ...]:
        pairs = zip(self.places, self.forms, strict=True)
        return tuple((self.module_name, place, form) for place, form in pairs)

    def check_inputs(self) -> None:
        """Check that no input was modified in place after the call.

        Raises:
            UnsupportedModelError: An input was modified in place.
        """
        if _versions(self.inputs) != self.versions:
            raise UnsupportedModelError(
                f"the input of module {self.module_name!r} is modified in place after it is used: "
                "make that operation out of place, or exclude the module's parameters"
            )


def _versions(inputs: Any) -> tuple[int, ...]:
    return tuple(
        leaf._version for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and not leaf.is_inference()
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode with gradients of its parameters disabled, and restore its state on exit.

    The context also disables the fused attention of `nn.MultiheadAttention`, which bypasses the submodules.
    """
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        for parameter, _ in required:
            parameter.requires_grad_(False)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in training:
            module.training = mode
        for parameter, needed in required:
            parameter.requires_grad_(needed)


@contextmanager
def called_modules(modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Collect the names of the `modules` that are called inside the context.

    Calls inside `torch.vmap` and other transforms do not count: their outputs have no gradients outside the transform.
    """
    called: set[str] = set()

    def hook_for(name: str) -> Callable[..., None]:
        def add(module: nn.Module, args: Any, output: Any) -> None:
            if not any(isinstance(leaf, Tensor) and is_transformed(leaf) for leaf in pytree.tree_leaves(output)):
                called.add(name)

        return add

    handles = [module.register_forward_hook(hook_for(name)) for name, module in modules.items()]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch(
    modules: Mapping[str, nn.Module],
    keep_outputs: set[str],
    shared: Set[Place],
    axes: Axes,
    routed: dict[nn.Module, RoutedCall],
) -> Iterator[list[Use]]:
    """Record every call of `modules` inside the context.

    Autograd can compute the gradient with respect to a recorded edge even if the model later overwrites the output.

    Args:
        modules: Modules to watch, by name.
        keep_outputs: Names of the modules whose output values are stored.
        shared: Outputs that all examples share, such as a position embedding. Each is repeated once per example, so
            that every example has a separate gradient.
        axes: Sizes of the batch.
        routed: The last call of each layer of experts, see `experts.opened`.
    """
    uses: list[Use] = []

    def hook_for(name: str, output_unused: bool) -> Callable[..., Any]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            with torch._C.DisableTorchFunction():  # a mode that observes the model need not see this function
                return recorded(module, args, kwargs, output)

        def recorded(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            leaves, spec = pytree.tree_flatten(output)
            places = tuple(p for p, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
            if any(is_transformed(leaves[place]) for place in places):
                raise UnsupportedModelError(
                    f"module {name!r} is called inside torch.vmap or another transform of torch.func in some batches "
                    "and outside in others: exclude its parameters with parameters.exclude"
                )
            forms = tuple(axes.form(leaves[place]) for place in places)
            repeated = [(name, place, form) in shared for place, form in zip(places, forms, strict=True)]
            for place, repeats in zip(places, repeated, strict=True):
                n_examples = axes.n_examples if repeats else None
                leaves[place] = _own_node(leaves[place], n_examples, len(places) > 1, output_unused)
            inputs = pytree.tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
            outputs = tuple(leaves[place] for place in places)
            kept = tuple(value.detach().clone() for value in outputs) if name in keep_outputs else ()
            edges = tuple(get_gradient_edge(value) for value in outputs)
            dtype = outputs[0].dtype if outputs else torch.float32
            versions = _versions(inputs)
            inside = routed.pop(module, None)
            uses.append(Use(name, module, inputs, versions, places, kept, edges, forms, any(repeated), dtype, inside))
            return pytree.tree_unflatten(leaves, spec)

        return record

    # prepend: the output must be the module's own, before other hooks change it
    handles = [
        module.register_forward_hook(hook_for(name, rule_for(module, ()) is linear), prepend=True, with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def _own_node(value: Tensor, n_examples: int | None, separate: bool, output_unused: bool) -> Tensor:
    """Return the same values at a graph node that stays valid after in-place operations.

    The node is neither a leaf nor a view: in-place operations fail on leaves and replace the nodes of views.

    Args:
        value: An output of a module.
        n_examples: Number of repetitions of a shared output; None for other outputs.
        separate: Create a node on which only the operations after the module depend. This is needed where one output
            of the module is computed from another.
        output_unused: Whether the backward pass of the module does not use the output. Such an output may be
            overwritten and needs no copy.
    """
    if not value.requires_grad:
        value = value.detach().requires_grad_()
    elif n_examples is None and not separate:
        if not value._is_view():
            return value
        if output_unused:
            return cast(Tensor, torch.ops.aten._unsafe_view(value, value.shape))
    return (value if n_examples is None else repeat(value, n_examples)).clone()


def repeat(value: Tensor, n_examples: int) -> Tensor:
    """Repeat a tensor that all examples share, (1, …) or (…), once per example: (B, …)."""
    return value.expand(n_examples, *(value.shape[1:] if value.shape[:1] == (1,) else value.shape))
