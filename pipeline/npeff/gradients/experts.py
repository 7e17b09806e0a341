"""Layers of experts of transformers: their forward pass as two routed layers, and the gradient rows of these layers.

Such a module keeps the weights of all experts in stacks of matrices. The decorator `use_experts_implementation` of
transformers describes it by attributes, for a choice of implementations. `opened` adds an implementation that records
what the rows are computed from: for each pair of a token and an expert, the inputs of both layers, and the gradients at
their outputs. These are before the gate and before the weights of the router, which therefore need no rule.

Legend: B batch, N tokens of the batch, k experts of a token, n = N k pairs of a token and an expert, R rank, E experts,
o outputs and i inputs of a layer of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor as is_transformed
from torch.autograd.graph import GradientEdge, get_gradient_edge

from npeff.gradients.contribution import Contribution, Dense
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.outer import live_positions
from npeff.gradients.routed import Routed

_described = WeakKeyDictionary[nn.Module, bool]()
"""Whether a module computes what its attributes say, for modules that have been called."""


@dataclass(frozen=True)
class RoutedCall:
    """One call of a layer of experts. Pairs are sorted by expert, and by token within an expert."""

    pairs_n: Tensor
    """token·k + place of the expert among those of the token."""
    experts_n: Tensor
    n_tokens: int
    inputs: tuple[Tensor, ...]
    """Inputs (n, i) of the first and of the second layer."""
    edges: tuple[GradientEdge, ...]
    """Where the outputs (n, o) of the layers are in the autograd graph."""


def stacks(module: nn.Module) -> tuple[str, str] | None:
    """Return the names of the weights (E, o, i) of the two layers, or None for all other modules.

    The weights are (E, i, o) if `module.is_transposed`.
    """
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_gate"):
        return None
    has_bias = getattr(module, "has_bias", False)
    unusual = getattr(module, "has_post_expert_norm", False) or getattr(module, "_is_expert_parallel", False)
    names = "gate_up_proj" if module.has_gate else "up_proj", "down_proj"
    expected = {*names, *(f"{name}_bias" for name in names if has_bias)}
    own = dict(module.named_parameters())
    if unusual or own.keys() != expected:
        return None
    return names if all(own[name].dim() == 3 for name in names) else None


@contextmanager
def opened(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, RoutedCall]]:
    """Record the calls of layers of experts (see `stacks`) inside the context: the last call of each module.

    A module that computes something else than its attributes say, which is found out at its first call, is left as it
    is.
    """
    calls: dict[nn.Module, RoutedCall] = {}
    replaced = [module for module in modules if _described.get(module, True) and "forward" not in vars(module)]
    for module in replaced:
        module.forward = partial(_forward, module, module.forward, calls)
    try:
        yield calls
    finally:
        for module in replaced:
            del module.forward  # the one of the class


def _forward(
    module: nn.Module, forward: Callable[..., Any], calls: dict[nn.Module, RoutedCall], *args: Any, **kwargs: Any
) -> Any:
    values = (*args, *kwargs.values())
    if torch.is_grad_enabled() and _are_routed(values):
        with torch._C.DisableTorchFunction():  # the order of the tokens is known, so that no mode need see it
            if module not in _described:
                _described[module] = _is_described(module, values, forward)
            if _described[module]:
                output, calls[module] = _run(module, *values)
                return output
    return forward(*args, **kwargs)


def _are_routed(values: Sequence[Any]) -> bool:
    """Return whether values are hidden states (N, i), and the numbers and the weights (N, k) of experts."""
    if len(values) != 3 or not all(isinstance(each, Tensor) and not is_transformed(each) for each in values):
        return False
    hidden, chosen, weights = values
    return hidden.dim() == chosen.dim() == 2 and chosen.shape == weights.shape and not chosen.is_floating_point()


@torch.no_grad()
def _is_described(module: nn.Module, values: Sequence[Tensor], forward: Callable[..., Any]) -> bool:
    """Return whether a module computes what its attributes say."""
    expected = forward(*values)
    try:
        found, _ = _run(module, *values)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, AttributeError, TypeError):  # other shapes, or attributes of another meaning
        return False
    if not isinstance(expected, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    tolerance = 1e-3 if found.dtype in (torch.float32, torch.float64) else 5e-2
    largest = float(expected.abs().nan_to_num(0, 0).amax()) if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def _run(module: Any, hidden_Ni: Tensor, chosen_Nk: Tensor, weights_Nk: Tensor) -> tuple[Tensor, RoutedCall]:
    """Compute the output of a layer of experts."""
    names = stacks(module)
    assert names is not None
    n_tokens, k = chosen_Nk.shape
    pairs_n = chosen_Nk.flatten().argsort(stable=True)
    experts_n, tokens_n = chosen_Nk.flatten()[pairs_n], pairs_n // k
    counts = experts_n.bincount(minlength=len(getattr(module, names[0]))).tolist()
    hidden_ni = hidden_Ni.index_select(0, tokens_n)
    outputs_no = _layer(module, names[0], hidden_ni, counts)
    gated_ni = module._apply_gate(outputs_no) if module.has_gate else module.act_fn(outputs_no)
    found_ni = _layer(module, names[1], gated_ni, counts)
    weighted_ni = found_ni * weights_Nk.flatten()[pairs_n, None]
    total_Ni = weighted_ni.new_zeros(n_tokens, weighted_ni.shape[1]).index_add(0, tokens_n, weighted_ni)
    edges = get_gradient_edge(outputs_no), get_gradient_edge(found_ni)
    inputs = hidden_ni.detach(), gated_ni.detach()
    return total_Ni.to(hidden_Ni.dtype), RoutedCall(pairs_n, experts_n, n_tokens, inputs, edges)


def _layer(module: Any, name: str, values_ni: Tensor, counts: Sequence[int]) -> Tensor:
    """Apply a layer of each expert to its pairs. The result is in the autograd graph."""
    weights, biases = getattr(module, name), getattr(module, f"{name}_bias") if module.has_bias else None
    parts = []
    for expert, part in enumerate(values_ni.split(counts)):
        if len(part):
            matrix_io = weights[expert] if module.is_transposed else weights[expert].T
            parts.append(part @ matrix_io if biases is None else torch.addmm(biases[expert], part, matrix_io))
    outputs_no = torch.cat(parts)
    return outputs_no if outputs_no.requires_grad else outputs_no.detach().requires_grad_()


def expert_rows(
    module: Any,
    call: RoutedCall,
    deltas: Sequence[Sequence[Tensor] | None],
    wanted: frozenset[str],
    n_examples: int,
) -> dict[str, Contribution]:
    """Compute the contributions of a layer of experts.

    Args:
        module: The module.
        call: Its call.
        deltas: For each of the two layers, R gradients (n, o) at its outputs, or None if all are zero.
        wanted: Names of parameters.
        n_examples: B.

    Returns:
        The contribution of each wanted parameter.

    Raises:
        UnsupportedModelError: The number of tokens is not a multiple of the number of examples.
    """
    if call.n_tokens % n_examples:
        raise UnsupportedModelError(
            f"a layer of experts has {call.n_tokens} tokens for {n_examples} examples: give every example the same "
            "number of tokens, or exclude the layer's parameters with parameters.exclude"
        )
    examples_n = call.pairs_n // (len(call.pairs_n) // n_examples)
    found: dict[str, Contribution] = {}
    for name, inputs_ni, rows in zip(stacks(module) or (), call.inputs, deltas, strict=True):
        if rows is None:
            continue
        live_n, shape = live_positions(rows), tuple(getattr(module, name).shape)
        pairs = (*rows, inputs_ni, call.experts_n, examples_n)
        *kept, inputs_ni, experts_n, kept_n = pairs if live_n.all() else (value[live_n] for value in pairs)
        if f"{name}_bias" in wanted:
            sums = [row.new_zeros(n_examples * shape[0], row.shape[1]) for row in kept]
            places_n = kept_n * shape[0] + experts_n
            biases = [total.index_add_(0, places_n, row) for total, row in zip(sums, kept, strict=True)]
            found[f"{name}_bias"] = Dense(torch.stack([each.unflatten(0, (n_examples, -1)) for each in biases], dim=1))
        if name in wanted:
            found[name] = Routed(tuple(kept), inputs_ni, experts_n, kept_n, n_examples, shape, module.is_transposed)
    return found
