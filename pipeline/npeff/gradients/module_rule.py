"""The general rule: gradient rows of any module, computed with `torch.func` by running the module again under vmap.

The rule needs the inputs of the module's call and the gradients at its outputs. It finds the axis of examples of each
tensor by trial: the module, run on the slices of one example, must reproduce that example's part of the batch outputs.

Legend: B batch, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from npeff.gradients.contribution import MEMORY_ELEMENTS
from npeff.gradients.errors import UnsupportedModelError

_MAX_TRIALS = 81
_TOLERANCE = 1e-3
"""Tolerance of the rows under vmap, relative to the norm of an example's rows."""
_traceable: dict[Hashable, bool] = {}
"""Whether the rows under vmap are right, by the type of the module and the shapes of its call. Some batching rules of
torch are wrong for some shapes: that of PReLU is wrong for R = 1 and R = B."""


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module: the inputs, and the value and the gradients of each output tensor that has a gradient."""

    module: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    places: tuple[int, ...]
    """Positions of the tensors in `outputs` and `deltas` among the flattened outputs."""
    outputs: tuple[Tensor, ...]
    deltas: tuple[Tensor, ...]
    """Gradients at the outputs, each (R, *output shape)."""
    axes: tuple[frozenset[int] | None, ...] | None = None
    """The axes that may hold the examples, for each output; None if any axis may. The trial alone cannot tell the axis
    of examples from one of positions, such as that of the queries of attention, of which each has an output, too."""


class _Slices:
    """A call as a function of the parameters and of one example's slices of the inputs."""

    def __init__(self, call: ModuleCall) -> None:
        self.call = call
        self.leaves, self.spec = pytree.tree_flatten(call.inputs)
        self.tensors = [place for place, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor)]

    def run(self, parameters: Mapping[str, Tensor], slices: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = list(self.leaves)
        for place, value in zip(self.tensors, slices, strict=True):
            leaves[place] = value
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        output = torch.func.functional_call(self.call.module, dict(parameters), args, kwargs, tie_weights=False)
        outputs = pytree.tree_leaves(output)
        return tuple(outputs[place] for place in self.call.places)

    def candidates(self, n_examples: int) -> list[list[int | None]]:
        """Return the axes that may hold the examples, for each input tensor, with the most common axis first."""
        found: list[list[int | None]] = []
        for leaf in (self.leaves[place] for place in self.tensors):
            sizes = enumerate(leaf.shape[:2])
            found.append([*(axis for axis, size in sizes if size and size % n_examples == 0), None])
        return found

    def split(self, axes: Sequence[int | None], n_examples: int) -> list[Tensor]:
        """Split the axis of examples of each input tensor into (examples, entries per example)."""
        return [
            leaf if axis is None else leaf.unflatten(axis, (n_examples, -1))
            for leaf, axis in zip((self.leaves[place] for place in self.tensors), axes, strict=True)
        ]


def _output_axes(part: Sequence[Tensor], call: ModuleCall, n_examples: int, example: int) -> list[int] | None:
    """Return the axis of examples of each output, or None if `part` is not this example's part of the outputs."""
    axes = []
    for small, large, possible in zip(part, call.outputs, call.axes or [None] * len(part), strict=True):
        if small.dim() != large.dim():
            return None
        changed = [axis for axis in range(small.dim()) if small.shape[axis] != large.shape[axis]]
        if len(changed) != 1 or small.shape[changed[0]] * n_examples != large.shape[changed[0]]:
            return None
        if possible is not None and changed[0] not in possible:
            return None
        expected = large.unflatten(changed[0], (n_examples, -1)).select(changed[0], example)
        tolerance = 1e-3 * float(expected.abs().nan_to_num(0, 0).amax()) if expected.numel() else 0.0
        if not torch.allclose(small, expected, rtol=1e-3, atol=tolerance, equal_nan=True):
            return None
        axes.append(changed[0])
    return axes


def _find_axes(
    function: _Slices, parameters: Mapping[str, Tensor], n_examples: int
) -> tuple[list[int | None], list[int]]:
    failure: Exception | None = None
    for axes in islice(product(*function.candidates(n_examples)), _MAX_TRIALS):
        found: list[list[int] | None] = []
        for example in (0, n_examples - 1):
            slices = _select(function.split(axes, n_examples), axes, example)
            try:
                with torch.no_grad():
                    part = function.run(parameters, slices)
            except (RuntimeError, ValueError, IndexError, AssertionError) as error:
                failure = error
                break
            found.append(_output_axes(part, function.call, n_examples, example))
        if len(found) == 2 and found[0] is not None and found[1] is not None:
            return list(axes), found[0]
    excluded = ", ".join(f'"*{name}"' for name in parameters)
    raise UnsupportedModelError(
        f"cannot find the axis of examples in the inputs of a {type(function.call.module).__name__}: put examples on "
        f"the first axis, or exclude the parameters of this module with parameters.exclude: [{excluded}]"
    ) from failure


def output_axes(call: ModuleCall, parameters: Mapping[str, Tensor], n_examples: int) -> list[int]:
    """Find the axis of examples of each of `call.outputs`. With a single example the axis is 0.

    Parameters and exceptions are those of `module_rows`.
    """
    if n_examples == 1:
        return [0] * len(call.outputs)
    _, axes = _find_axes(_Slices(call), parameters, n_examples)
    return axes


def moved_outputs(
    call: ModuleCall, parameters: Mapping[str, Tensor], directions: Sequence[Mapping[str, Tensor]]
) -> list[list[Tensor]]:
    """Compute (∂outputs/∂θ) g, the derivative of each of `call.outputs` with respect to ε at θ + ε·g, for directions g.

    The function differentiates the backward pass u ↦ ⟨(∂outputs/∂θ)ᵀ u, g⟩, which is linear in u. The result is the
    adjoint of the backward pass of autograd, even if the module modifies its gradients.

    Args:
        call: The call of the module.
        parameters: Values of the module's parameters, by name within the module.
        directions: The directions g, each by name within the module.

    Returns:
        One list per direction, with one tensor per output.

    Raises:
        RuntimeError: A backward pass has no derivative (as in recurrent layers of cuDNN) or a wrong derivative.
    """
    function = _Slices(call)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        outputs = function.run(leaves, [function.leaves[place] for place in function.tensors])
        differ = [place for place, value in enumerate(outputs) if value.requires_grad]  # with the parameters
        live = [outputs[place] for place in differ]
        adjoints = [torch.randn(value.shape, generator=generator).to(value).requires_grad_() for value in live]
        rows = torch.autograd.grad(live, list(leaves.values()), adjoints, create_graph=True, allow_unused=True)
        used = {name: row for name, row in zip(leaves, rows, strict=True) if row is not None}
        found = []
        for direction in directions:
            weights = [direction[name].to(row) for name, row in used.items()]
            moved = torch.autograd.grad(list(used.values()), adjoints, weights, retain_graph=True)
            _check_adjoint(adjoints, moved, list(used.values()), weights)
            motions = dict(zip(differ, moved, strict=True))
            found.append([motions.get(place, torch.zeros_like(value)) for place, value in enumerate(outputs)])
    return found


def _check_adjoint(
    adjoints: Sequence[Tensor], moved: Sequence[Tensor], rows: Sequence[Tensor], directions: Sequence[Tensor]
) -> None:
    """Check that ⟨u, J g⟩ = ⟨Jᵀ u, g⟩ for the random u.

    The equation does not hold if a backward pass contains operations that autograd does not record.
    """
    with torch.no_grad():
        outer = sum(float((u.double() * value).sum()) for u, value in zip(adjoints, moved, strict=True))
        inner = sum(float((row.double() * g).sum()) for row, g in zip(rows, directions, strict=True))
        scale = sum(float(value.double().square().sum()) for value in moved) ** 0.5
        tolerance = min(0.1, 10 * max(torch.finfo(value.dtype).eps for value in moved) ** 0.5)
    if abs(outer - inner) > tolerance * scale:  # false for nan: an example that is not finite proves nothing
        raise RuntimeError("the derivative of a backward pass does not match the backward pass")


@dataclass(frozen=True)
class _Split:
    """Inputs and output gradients with a separate axis of examples. The axis is None for inputs that examples share."""

    function: _Slices
    parameters: dict[str, Tensor]
    inputs: list[Tensor]
    input_axes: list[int | None]
    deltas: list[Tensor]
    delta_axes: list[int]
    n_examples: int

    def traced(self) -> dict[str, Tensor]:
        """Compute the rows of all examples at once under vmap."""

        def example_rows(slices: list[Tensor], deltas: list[Tensor]) -> dict[str, Tensor]:
            _, pullback, *_ = torch.func.vjp(lambda values: self.function.run(values, slices), self.parameters)
            rows: dict[str, Tensor] = torch.vmap(lambda row: pullback(tuple(row))[0])(deltas)
            return rows

        numbers = len(self.function.call.deltas[0]) * sum(value.numel() for value in self.parameters.values())
        chunk_size = min(self.n_examples, max(1, MEMORY_ELEMENTS // numbers))
        batched = torch.vmap(example_rows, in_dims=(self.input_axes, self.delta_axes), chunk_size=chunk_size)
        rows: dict[str, Tensor] = batched(self.inputs, self.deltas)
        return rows

    def key(self) -> Hashable:
        """Return a key that is equal for calls with the same type of module and the same shapes."""
        shapes = [(tuple(value.shape), value.dtype) for value in (*self.inputs, *self.deltas)]
        parameters = [(name, tuple(value.shape)) for name, value in self.parameters.items()]
        axes = *self.input_axes, *self.delta_axes
        return type(self.function.call.module), tuple(shapes), tuple(parameters), axes

    def agrees(self, rows: Mapping[str, Tensor]) -> bool:
        """Compare rows with those of the loop, for the first, a middle and the last example."""
        examples = sorted({0, self.n_examples // 2, self.n_examples - 1})
        expected = self.looped(examples)
        for name, values in expected.items():
            if rows[name].shape[1:] != values.shape[1:] or len(rows[name]) != self.n_examples:
                return False
            error = (rows[name][examples].double() - values.double()).flatten(1).norm(dim=1)
            bound = _TOLERANCE if values.dtype in (torch.float32, torch.float64) else 50 * _TOLERANCE
            if (error > bound * values.double().flatten(1).norm(dim=1)).any():  # false for nan
                return False
        return True

    def looped(self, examples: Iterable[int]) -> dict[str, Tensor]:
        """Compute the rows of some examples in a loop over examples and rows."""
        chosen, rank = list(examples), len(self.function.call.deltas[0])
        leaves = {name: value.detach().requires_grad_() for name, value in self.parameters.items()}
        rows = {name: value.new_zeros(len(chosen), rank, *value.shape) for name, value in self.parameters.items()}
        for place, example in enumerate(chosen):
            outputs = self.function.run(leaves, _select(self.inputs, self.input_axes, example))
            deltas = _select(self.deltas, self.delta_axes, example)
            live = [number for number, value in enumerate(outputs) if value.requires_grad]  # with the parameters
            for row in range(rank if live else 0):
                directions = [deltas[number][row] for number in live]
                used = [outputs[number] for number in live]
                found = torch.autograd.grad(
                    used, list(leaves.values()), directions, retain_graph=True, allow_unused=True
                )
                for name, value in zip(leaves, found, strict=True):
                    if value is not None:
                        rows[name][place, row] = value.to_dense() if value.is_sparse else value
        return rows


def _select(values: Sequence[Tensor], axes: Sequence[int | None], example: int) -> list[Tensor]:
    pairs = zip(values, axes, strict=True)
    return [value if axis is None else value.select(axis, example) for value, axis in pairs]


def module_rows(call: ModuleCall, parameters: dict[str, Tensor], n_examples: int) -> dict[str, Tensor]:
    """Compute the rows of each parameter of a module.

    Args:
        call: The call of the module.
        parameters: Values of the parameters, by name within the module.
        n_examples: B, the number of examples in the batch.

    Returns:
        Rows (B, R, *shape) by name within the module.

    Raises:
        UnsupportedModelError: The axis of examples cannot be found in the module's inputs or outputs.
    """
    function = _Slices(call)
    if n_examples == 1:
        # the whole call belongs to the one example
        input_axes: list[int | None] = [None] * len(function.tensors)
        output_axes = [0] * len(call.deltas)
        deltas = [value[:, None] for value in call.deltas]
    else:
        input_axes, output_axes = _find_axes(function, parameters, n_examples)
        places = zip(call.deltas, output_axes, strict=True)
        deltas = [value.unflatten(axis + 1, (n_examples, -1)) for value, axis in places]
    inputs = function.split(input_axes, n_examples)
    delta_axes = [axis + 1 for axis in output_axes]
    split = _Split(function, parameters, inputs, input_axes, deltas, delta_axes, n_examples)
    key = split.key()
    if _traceable.get(key, True):
        try:
            # plain attention has a batching rule, fused attention has none; vmap loops over other kernels without one
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                rows = split.traced()
        except RuntimeError:
            # vmap does not support, for example, recurrent kernels and control flow that depends on the data
            return split.looped(range(n_examples))
        if key not in _traceable:
            _traceable[key] = split.agrees(rows)
        if _traceable[key]:
            return rows
    return split.looped(range(n_examples))
