"""Which module's calls account for which parameter.

Usually a parameter's own module. Some modules read the parameters of children that they never call (attention reads
its output projection's weight): those are accounted for by the nearest module above that is called. So are those of a
module that computes something for all examples at once, where this cannot be repeated for each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from npeff.gradients.capture import called_modules
from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.parameters import ParameterLayout

Owners = dict[str, dict[str, str]]
"""module name -> {a parameter's name within the module: its name in the layout}.

A parameter that is shared appears at each of its places, so that each place's uses are counted once.
"""


def find_owners(model: nn.Module, layout: ParameterLayout, run: Callable[[], Tensor]) -> Owners:
    """Owners of the parameters of `layout`; `run` computes the logits of a batch.

    Places that the logits do not depend on have no owner. Raises UnsupportedModelError if no module that accounts for
    a parameter is called.
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
                        f"parameter {place!r} is used, but no module that holds it is called: call the model itself "
                        "in logits, or exclude it with parameters.exclude"
                    )
                owners.setdefault(owner, {})[place.removeprefix(f"{owner}.")] = names[parameter]
    return owners


def with_new_places(owners: Owners, found: Owners) -> Owners:
    """Those of `owners`, and those of `found` for places that nobody accounts for yet."""
    owned = {_place(module_name, local) for module_name, own in owners.items() for local in own}
    merged = {name: dict(own) for name, own in owners.items()}
    for module_name, own in found.items():
        new = {local: full for local, full in own.items() if _place(module_name, local) not in owned}
        if new:
            merged.setdefault(module_name, {}).update(new)
    return merged


def without_owner(model: nn.Module, layout: ParameterLayout, owners: Owners) -> dict[str, nn.Module]:
    """Modules that were not called so far and have parameters that nobody accounts for."""
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
    """The same, but what `module_names` own is accounted for by the nearest called module above each.

    Raises UnsupportedModelError if there is none.
    """
    with called_modules(dict(model.named_modules())) as called, torch.no_grad():
        run()
    moved = {name: dict(owned) for name, owned in owners.items()}
    for name in module_names:
        above = _nearest_called(name, called)
        if above is None:
            raise UnsupportedModelError(
                f"examples are not on the first axis of the output of {name or 'the model'}: put them there "
                "(batch_first=True), or exclude its parameters with parameters.exclude"
            )
        inner = name.removeprefix(f"{above}.")
        moved.setdefault(above, {}).update({f"{inner}.{local}": full for local, full in moved.pop(name).items()})
    return moved


def layout_names(model: nn.Module, layout: ParameterLayout) -> Iterator[tuple[nn.Parameter, str]]:
    """The parameters of the layout with their names. Raises UnsupportedModelError if the model has others."""
    found = dict(model.named_parameters())
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        if name not in found or tuple(found[name].shape) != shape:
            raise UnsupportedModelError(f"the model has no parameter {name!r} of shape {shape}")
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
    """Put a copy that requires a gradient at each place, so that the uses of each place can be told apart."""
    copies = [nn.Parameter(parameter.detach().clone()) for _, _, parameter in places]
    try:
        for (module_name, local, _), copy in zip(places, copies, strict=True):
            modules[module_name]._parameters[local] = copy
        yield copies
    finally:
        for module_name, local, parameter in places:
            modules[module_name]._parameters[local] = parameter
