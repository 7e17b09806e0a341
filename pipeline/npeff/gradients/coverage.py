"""Check that the collected rows add up to the gradient that autograd computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from npeff.gradients.capture import LogitsFunction, frozen
from npeff.gradients.collector import GradientCollector
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.owners import layout_names
from npeff.gradients.parameters import ParameterLayout
from npeff.options.labels import LabelSpec

# (relative, absolute): relative to the norm of the parameter's gradient, and to the norm of the gradient of all
# parameters. The second one covers parameters whose gradient is zero up to rounding.
_TOLERANCES = {torch.float64: (1e-5, 1e-8), torch.float32: (1e-3, 1e-6)}
_HALF_TOLERANCES = (5e-2, 1e-3)


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

    Both are gradients of Σ_{b,r} w_br ⟨direction_br, z_b⟩. The weights w differ between examples, so that rows assigned
    to the wrong example are detected too. This needs a batch of two or more examples.

    Args:
        model: The model.
        logits_fn: Function that computes the logits of a batch.
        batch: Two or more examples.
        layout: The selected parameters.
        labels: See `GradientCollector`.
        examples: See `GradientCollector.collect`.
        targets: See `GradientCollector.collect`.

    Raises:
        UnsupportedModelError: The gradients of a parameter differ: the parameter is used outside its own module, or by
            a layer that is not supported. The message names the first such parameter.
    """
    collector = GradientCollector(model, logits_fn, layout, labels or LabelSpec())
    collected = collector.collect(batch, examples, targets)
    logits, directions = collected.logits, collected.labels.directions
    if not logits.isfinite().all():
        raise UnsupportedModelError(
            "the logits of the examples used to check the model are not finite: check model and examples for NaN"
        )
    generator = torch.Generator().manual_seed(0)
    weights_BR = torch.randn(len(logits), len(directions), generator=generator, dtype=torch.float64).to(logits.device)
    direction = torch.zeros_like(logits)
    for row in range(len(directions)):
        direction += directions[row] * weights_BR[:, row].to(logits).view(-1, *[1] * (logits.dim() - 1))
    expected = _gradients(model, logits_fn, batch, layout, direction)
    total = torch.stack([value.double().norm() for value in expected.values() if value is not None]).norm()
    for name, value in expected.items():
        part = collected.contributions.get(name)
        if value is None and part is None:
            continue
        parameter = model.get_parameter(name)
        found = torch.zeros_like(parameter) if part is None else part.new_zeros(1, *parameter.shape)
        if part is not None:
            part.add_weighted_sum(weights_BR[None], found)
            found = found[0]
        reference = torch.zeros_like(parameter) if value is None else value
        relative, absolute = _TOLERANCES.get(reference.dtype, _HALF_TOLERANCES)
        error = (found.double() - reference.double()).norm()
        if not error <= relative * reference.double().norm() + absolute * total:
            module = name.rpartition(".")[0]
            kind = type(model.get_submodule(module)).__name__
            raise UnsupportedModelError(
                f"the gradient of {name!r} at module {module!r} ({kind}) is incomplete, perhaps because the parameter "
                f"is used outside this module: exclude it with parameters.exclude: [{name!r}]"
            )


def _gradients(
    model: nn.Module, logits_fn: LogitsFunction, batch: Any, layout: ParameterLayout, direction: Tensor
) -> dict[str, Tensor | None]:
    with frozen(model):
        named = {name: parameter for parameter, name in layout_names(model, layout)}
        for parameter in named.values():
            parameter.requires_grad_(True)
        logits = logits_fn(model, batch)
        found = torch.autograd.grad(logits, list(named.values()), direction, allow_unused=True)
    return dict(zip(named, found, strict=True))
