"""Check that the collected rows add up to the gradient that autograd computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from npeff.gradients.backward_seed import backward_seed
from npeff.gradients.calls import Collected
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.labels import IGNORED
from npeff.gradients.owners import layout_names
from npeff.gradients.parameters import ParameterLayout

# (relative, absolute): relative to the norm of the parameter's gradient, and to the norm of the gradient of all
# parameters. The second one covers parameters whose gradient is zero up to rounding.
_TOLERANCES = {torch.float64: (1e-5, 1e-8), torch.float32: (1e-3, 1e-6)}
_HALF_TOLERANCES = (5e-2, 1e-3)
_RANDOM = (
    "the logits differ between two passes over the same batch, because of dropout or another random operation that "
    "evaluation mode does not turn off: turn it off in the task's logits()"
)


def wrong_parameters(
    model: nn.Module,
    layout: ParameterLayout,
    run: Callable[[], Tensor],
    collected: Collected,
    precision: torch.dtype,
    seed: int,
) -> list[str] | None:
    """Compare the weighted sum of the rows of each parameter with an ordinary backward pass.

    Both are gradients of Σ_{b,r} w_br ⟨direction_br, z_b⟩. The weights w are random, so that rows assigned to the wrong
    example are detected too. The gradient of one parameter at a time is in memory.

    Args:
        model: The model, inside `frozen`.
        layout: The selected parameters.
        run: Function that computes the logits of the batch.
        collected: The rows of the batch.
        precision: The lowest precision in which the model computes.
        seed: Seed of the weights.

    Returns:
        The names of the parameters whose gradients differ. None if they cannot be compared, because the gradients of an
        example are not finite.
    """
    directions = collected.labels.directions
    generator = torch.Generator().manual_seed(seed)
    weights_BR = torch.randn(len(collected.logits), len(directions), generator=generator, dtype=torch.float64)
    weights_BR = weights_BR.to(collected.logits.device)
    direction = torch.zeros_like(collected.logits)
    for row, weights_B in zip(directions, weights_BR.unbind(1), strict=True):
        direction += row * weights_B.to(direction).view(-1, *[1] * (direction.dim() - 1))
    errors: dict[str, tuple[Tensor, Tensor]] = {}

    def compare(name: str, reference: Tensor) -> None:
        part = collected.contributions.get(name)
        found = reference.new_zeros(1, *reference.shape) if part is None else part.new_zeros(1, *reference.shape)
        if part is not None:
            part.add_weighted_sum(weights_BR[None], found)
        errors[name] = (found[0].double() - reference.double()).norm(), reference.double().norm()

    with _compared_gradients(model, layout, compare) as copies, torch.enable_grad():
        logits = run()
        if logits.requires_grad:
            backward_seed(logits, direction).backward(inputs=list(copies.values()))
        for name, copy in copies.items():
            if name not in errors and name in collected.contributions:  # autograd finds no gradient
                with torch.no_grad():
                    compare(name, torch.zeros_like(copy))
    relative, absolute = _TOLERANCES.get(precision, _HALF_TOLERANCES)
    total = torch.stack([direction.new_zeros(()).double(), *(norm for _, norm in errors.values())]).norm()
    if not total.isfinite():
        return None
    found = ((name, *errors[name]) for name in layout.names if name in errors)
    return [name for name, error, norm in found if not error <= relative * norm + absolute * total]


@contextmanager
def _compared_gradients(
    model: nn.Module, layout: ParameterLayout, compare: Callable[[str, Tensor], None]
) -> Iterator[dict[str, nn.Parameter]]:
    """Replace the parameters of the layout by copies with the same values that require a gradient.

    The gradient of a copy is passed to `compare` when it is complete, and then freed. The parameters themselves do not
    change, because other threads may use them.
    """
    copies = {name: nn.Parameter(parameter.detach()) for parameter, name in layout_names(model, layout)}
    names = {id(parameter): name for parameter, name in layout_names(model, layout)}

    def hook_for(name: str) -> Callable[[Tensor], None]:
        def compare_and_free(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            compare(name, gradient.to_dense() if gradient.is_sparse else gradient)

        return compare_and_free

    for name, copy in copies.items():
        copy.register_post_accumulate_grad_hook(hook_for(name))
    places = [
        (module, local, parameter)
        for module in model.modules()
        for local, parameter in module._parameters.items()
        if parameter is not None and id(parameter) in names
    ]
    try:
        for module, local, parameter in places:
            module._parameters[local] = copies[names[id(parameter)]]
        with _Copies({parameter: copies[name] for parameter, name in names.items()}):
            yield copies
    finally:
        for module, local, parameter in places:
            module._parameters[local] = parameter


class _Copies(TorchFunctionMode):
    """Passes copies to torch functions in place of parameters that a model also holds elsewhere, as in a list.

    A view of a parameter that was made before, such as a stored transpose, becomes the same view of the copy.

    Args:
        copies: The copies, by `id` of the parameter.
    """

    def __init__(self, copies: Mapping[int, nn.Parameter]) -> None:
        super().__init__()
        self._copies = copies

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(self._of, args), **{name: self._of(value) for name, value in (kwargs or {}).items()})

    def _of(self, value: Any) -> Any:
        if type(value) in (list, tuple):
            return type(value)(map(self._of, value))
        if not isinstance(value, Tensor):
            return value
        if (copy := self._copies.get(id(value))) is not None:
            return copy
        if value.requires_grad and value._is_view() and (copy := self._copies.get(id(value._base))) is not None:
            return copy.as_strided(value.shape, value.stride(), value.storage_offset())
        return value


def why_wrong(model: nn.Module, run: Callable[[], Tensor], name: str, outside: bool, n_examples: int) -> str:
    """Return the message for a parameter whose gradients differ: the most probable cause and the remedy.

    Args:
        model: The model, inside `frozen`.
        run: Function that computes the logits of the batch.
        name: Name of the parameter.
        outside: Whether the parameter was used while its module was not called.
        n_examples: Number of examples in the batch.
    """
    holder, exclude = name.rpartition(".")[0], f"or exclude it with parameters.exclude: [{name!r}]"
    module = model.get_submodule(holder)
    where = f"the rows of {name!r} at module {holder!r} ({type(module).__name__}) are not its gradient"
    with torch.no_grad():
        if _differ(run(), run()):
            return _RANDOM
    if outside:
        return f"{where}, because the model uses it outside this module: use it in one module only, {exclude}"
    if n_examples > 1:
        return (
            f"{where} in a batch of {n_examples} examples: an operation mixes the examples of a batch, changes their "
            f"order, or has a wrong derivative: make the examples independent, {exclude}"
        )
    return f"{where}: an operation of the model has a wrong derivative, or no hook sees it: correct it, {exclude}"


def made_logits(logits: Tensor, targets: Tensor | None) -> Tensor:
    """Return the logits (n, C) of all predictions of a batch."""
    return logits if targets is None else logits[targets != IGNORED]


def check_independent(alone: Tensor, together: Tensor, again: Tensor) -> None:
    """Check that the logits of the examples of a batch are those of each example alone.

    Args:
        alone: (n, C), of the predictions of examples in batches of their own.
        together: (n, C), of the same predictions in one batch.
        again: (n, C), of a second pass over this batch.

    Raises:
        UnsupportedModelError: The logits differ by more than rounding.
    """
    if _differ(together, again):
        raise UnsupportedModelError(_RANDOM)
    if _differ(alone, together):
        raise UnsupportedModelError(
            "the logits of an example depend on the other examples in its batch, for example on their number, their "
            "mean or their padding: make the examples independent in the task's logits()"
        )


def _differ(found: Tensor, expected: Tensor) -> bool:
    """Return whether logits differ by more than rounding. False for an example whose logits are not finite."""
    relative, _ = _TOLERANCES.get(expected.dtype, _HALF_TOLERANCES)
    if found.shape != expected.shape:
        return True
    differences = (found.double() - expected.double()).abs().amax(-1)
    return bool((differences > 10 * relative * expected.double().abs().amax(-1)).any())
