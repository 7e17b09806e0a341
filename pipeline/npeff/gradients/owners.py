"""Owners of parameters: for each parameter, the module whose calls yield the parameter's gradient rows.

The owner of a parameter is usually the module that holds it. Some modules use the parameters of children that they
never call (attention uses the weight of its output projection). The owner of such a parameter is the nearest called
module above. The same holds for a module whose output all examples share, if the output cannot be repeated for each
example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from npeff.gradients.capture import called_modules
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.parameters import ParameterLayout, in_memory

Owners = dict[str, dict[str, str]]
"""Maps the name of a module to {the name of a parameter within the module: the name of the parameter in the layout}.

A shared parameter has one entry for each module that holds it, so that each use is counted exactly once.
"""


def find_owners(model: nn.Module, layout: ParameterLayout, run: Callable[[], Tensor]) -> Owners:
    """Find the owners of the parameters of `layout`. Parameters that the logits do not depend on have no owner.

    Args:
        model: The model.
        layout: The selected parameters.
        run: Function that computes the logits of a batch.

    Returns:
        The owners of the parameters.

    Raises:
        UnsupportedModelError: The logits depend on a parameter, but no module that holds it is called.
    """
    names, modules = dict(layout_names(model, layout)), dict(model.named_modules())
    with called_modules(modules) as called, torch.no_grad():
        run()
    owners: Owners = {}
    idle: list[tuple[str, str, nn.Parameter]] = []
    for module_name, module in modules.items():
        for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter not in names:
                continue
            if module_name in called:
                owners.setdefault(module_name, {})[local] = names[parameter]
            else:
                idle.append((module_name, local, parameter))
    if idle:
        with _separate_copies(modules, idle) as copies:
            logits = run()
            used: list[Tensor | None] = [None] * len(copies)
            if logits.requires_grad:
                used = list(torch.autograd.grad(logits.sum(), copies, allow_unused=True))
        for (module_name, local, parameter), gradient in zip(idle, used, strict=True):
            if gradient is not None:
                owner = _nearest_called(module_name, called)
                place = _place(module_name, local)
                if owner is None:
                    raise UnsupportedModelError(
                        f"parameter {place!r} is used, but no module that contains it is called: call the model "
                        "itself in logits(), or exclude the parameter with parameters.exclude"
                    )
                owners.setdefault(owner, {})[place.removeprefix(f"{owner}.")] = names[parameter]
    return owners


def with_new_places(owners: Owners, found: Owners) -> Owners:
    """Return `owners`, extended by the entries of `found` for parameters that have no owner yet."""
    owned = {_place(module_name, local) for module_name, own in owners.items() for local in own}
    merged = {name: dict(own) for name, own in owners.items()}
    for module_name, own in found.items():
        new = {local: full for local, full in own.items() if _place(module_name, local) not in owned}
        if new:
            merged.setdefault(module_name, {}).update(new)
    return merged


def without_owner(model: nn.Module, layout: ParameterLayout, owners: Owners) -> dict[str, nn.Module]:
    """Return the modules that hold parameters of the layout without an owner."""
    names = dict(layout_names(model, layout))
    owned = {_place(module_name, local) for module_name, own in owners.items() for local in own}
    return {
        module_name: module
        for module_name, module in model.named_modules()
        if any(
            parameter in names and _place(module_name, local) not in owned
            for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        )
    }


def move_up(model: nn.Module, owners: Owners, module_names: Iterable[str], run: Callable[[], Tensor]) -> Owners:
    """Return `owners` with the parameters of each of `module_names` moved to the nearest called module above.

    Raises:
        UnsupportedModelError: No called module is above one of `module_names`.
    """
    with called_modules(dict(model.named_modules())) as called, torch.no_grad():
        run()
    moved = {name: dict(owned) for name, owned in owners.items()}
    for name in module_names:
        above = _nearest_called(name, called)
        if above is None:
            raise UnsupportedModelError(
                f"examples are not on the first axis of the output of {name or 'the model'}: put examples on the first "
                "axis (batch_first=True), or exclude its parameters with parameters.exclude"
            )
        inner = name.removeprefix(f"{above}.")
        moved.setdefault(above, {}).update({f"{inner}.{local}": full for local, full in moved.pop(name).items()})
    return moved


def layout_names(model: nn.Module, layout: ParameterLayout) -> Iterator[tuple[nn.Parameter, str]]:
    """Yield the parameters of the layout with their names.

    Raises:
        UnsupportedModelError: The model lacks a parameter of the layout, or the shapes differ.
    """
    found = dict(model.named_parameters())
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in found or tuple(found[name].shape) != shape:
            raise UnsupportedModelError(
                f"the model has no parameter {name!r} of shape {shape}: use the model for which the layout was made"
            )
        yield found[name], name


def _place(module_name: str, local: str) -> str:
    return f"{module_name}.{local}" if module_name else local


def _nearest_called(module_name: str, called: set[str]) -> str | None:
    while module_name:
        module_name = module_name.rpartition(".")[0]
        if module_name in called:
            return module_name
    return None


@contextmanager
def _separate_copies(
    modules: dict[str, nn.Module], places: list[tuple[str, str, nn.Parameter]]
) -> Iterator[list[nn.Parameter]]:
    """Replace each parameter by a copy that requires a gradient, to separate the uses of shared parameters."""
    copies = []
    for _, _, parameter in places:
        with in_memory([parameter]):
            copies.append(nn.Parameter(parameter.detach().clone()))
    try:
        for (module_name, local, _), copy in zip(places, copies, strict=True):
            modules[module_name]._parameters[local] = copy
        yield copies
    finally:
        for module_name, local, parameter in places:
            modules[module_name]._parameters[local] = parameter
