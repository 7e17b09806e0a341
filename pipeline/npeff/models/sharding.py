"""A model whose parameters are divided among the processes of a worker.

The parameters are grouped into *units*: the blocks of the model, and each module outside the blocks that holds
parameters itself. Each process keeps a shard of every unit (`npeff.execution.team`). A unit has its values in memory
only while one of its modules is called or a backward pass needs them, and until another unit is fetched. A process
needs the memory for 1/n of the model and for the values of one unit.

This is the storage of fully sharded data parallelism (Zhao et al. 2023, "PyTorch FSDP"), for parameters that need no
gradient. PyTorch's `fully_shard` replaces the parameters by other objects while a module runs, and all processes must
make the same passes. Here the parameters stay the same objects with the same shapes, and their storage is filled and
emptied. Code that observes a model therefore works as with a model in one memory, and the processes may make different
passes, as the checks of gradient rows do.

Legend: n processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd.graph import saved_tensors_hooks

from npeff.execution.team import Team
from npeff.gradients import UnsupportedModelError

_ALIGNED = 64
"""Alignment in bytes of each parameter in its unit: that of torch's allocator, on which the kernels may depend."""
_NO_VALUES = ("data is not allocated yet", "out of bounds for storage of size 0")
"""Parts of torch's errors for a tensor whose storage is empty."""


class Unit:
    """Parameters of one dtype that are fetched together."""

    def __init__(self, number: int, parameters: Sequence[nn.Parameter], team: Team, device: torch.device) -> None:
        self.number, self.pins, self.changed = number, 0, False
        dtype, offsets, end = parameters[0].dtype, [], 0
        aligned = max(1, _ALIGNED // dtype.itemsize)
        for parameter in parameters:
            offsets.append(end)
            end += -(-parameter.numel() // aligned) * aligned
        share = aligned * team.size
        self.n_entries = -(-end // share) * share
        self.flat = torch.empty(self.n_entries, dtype=dtype, device=device)
        self.shard = torch.empty(self.n_entries * dtype.itemsize // team.size, dtype=torch.uint8, device=device)
        self._scatter(parameters, offsets, team, device)
        self.parameters = [
            nn.Parameter(self.flat[offset : offset + value.numel()].view(value.shape), value.requires_grad)
            for offset, value in zip(offsets, parameters, strict=True)
        ]
        self.release()

    @property
    def n_bytes(self) -> int:
        return self.n_entries * self.flat.dtype.itemsize

    @property
    def is_present(self) -> bool:
        return self.flat.untyped_storage().size() > 0

    @property
    def content(self) -> Tensor:
        """The values, as bytes."""
        return self.flat.view(torch.uint8)

    def allocate(self) -> None:
        self.flat.untyped_storage().resize_(self.n_bytes)

    def release(self) -> None:
        self.flat.untyped_storage().resize_(0)

    def _scatter(
        self, parameters: Sequence[nn.Parameter], offsets: Sequence[int], team: Team, device: torch.device
    ) -> None:
        """Send the values of process 0 to the shards of all processes."""
        if team.rank > 0:
            team.scatter(None, self.shard)
            return
        self.flat.zero_()
        for offset, value in zip(offsets, parameters, strict=True):
            self.flat[offset : offset + value.numel()].copy_(value.detach().reshape(-1))
        team.scatter(self.content, self.shard)


@dataclass(frozen=True)
class _Saved:
    """A tensor that the backward pass needs, as a view of the values of a unit."""

    unit: Unit
    offset: int
    shape: torch.Size
    strides: tuple[int, ...]


class Shards:
    """The units of a model, of which few are in memory."""

    def __init__(self, team: Team) -> None:
        self._team, self._n_kept = team, team.n_kept + 1
        self.units: list[Unit] = []
        self._present: dict[int, Unit] = {}
        """The units in memory, by the address of their storage."""
        self._saving: list[saved_tensors_hooks] = []
        self._uncalled: dict[str, list[Unit]] = {}
        """The units of modules outside the blocks that were not called yet, by the name of the module."""

    def add(self, parameters: Sequence[nn.Parameter], device: torch.device) -> Unit:
        unit = Unit(len(self.units), parameters, self._team, device)
        for parameter in unit.parameters:
            parameter.holder = _Holder(self, unit)  # type: ignore[attr-defined]  # see `gradients.in_memory`
        self.units.append(unit)
        return unit

    def pin(self, unit: Unit) -> None:
        """Keep the values of a unit in memory until `unpin`."""
        self._fetch(unit)
        unit.pins += 1

    def unpin(self, unit: Unit) -> None:
        unit.pins -= 1

    def watch(self, name: str, module: nn.Module, units: list[Unit], is_block: bool) -> None:
        """Keep the values of units in memory while a module is called."""
        if not is_block:
            self._uncalled[name] = units

        def enter(*_: Any) -> None:
            self._uncalled.pop(name, None)
            with torch._C.DisableTorchFunction():  # a mode that observes the model need not see this function
                for unit in units:
                    self.pin(unit)
            if peek_interpreter_stack() is None:  # transforms of torch.func refuse these hooks, and need none
                self._saving.append(saved_tensors_hooks(self._pack, self._unpack))
                self._saving[-1].__enter__()

        def leave(*_: Any) -> None:
            if peek_interpreter_stack() is None:
                self._saving.pop().__exit__()
            for unit in units:
                self.unpin(unit)

        module.register_forward_pre_hook(enter, prepend=True)
        module.register_forward_hook(leave, always_call=True)

    def keep_uncalled(self, error: RuntimeError) -> bool:
        """After a pass that failed, keep the values of modules that are not called in memory for good.

        A model may use the weight of such a module, as DeBERTa does with its relative positions.

        Returns:
            Whether parameters without values may be the cause of the error, so that the pass should be repeated.
        """
        units = [unit for group in self._uncalled.values() for unit in group]
        self._uncalled.clear()
        for unit in units:
            self.pin(unit)
        return bool(units) and any(part in str(error) for part in _NO_VALUES)

    def _fetch(self, unit: Unit) -> None:
        if unit.is_present:
            return
        for address, other in list(self._present.items()):
            if not other.pins:
                self._release(address)
        assert self._n_kept == self._team.n_kept, "the processes keep the shards of another model, loaded later"
        unit.allocate()
        with torch.no_grad():
            self._team.fetch(unit.number, unit.content)
        self._present[unit.flat.untyped_storage().data_ptr()] = unit

    def _release(self, address: int) -> None:
        unit = self._present.pop(address)
        if unit.changed:
            self._team.store(unit.number, unit.content)
            unit.changed = False
        unit.release()

    def _pack(self, value: Tensor) -> _Saved | tuple[Tensor, int]:
        with torch._C.DisableTorchFunction():
            unit = self._present.get(value.untyped_storage().data_ptr())
            if unit is None:
                return value, value._version
            return _Saved(unit, int(value.storage_offset()), value.shape, value.stride())

    def _unpack(self, saved: _Saved | tuple[Tensor, int]) -> Tensor:
        if isinstance(saved, _Saved):
            self._fetch(saved.unit)
            return saved.unit.flat.as_strided(saved.shape, saved.strides, saved.offset)
        value, version = saved
        if value._version != version:  # autograd checks it only where it keeps the tensor itself
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )
        return value


@dataclass(frozen=True)
class _Holder:
    """Keeps the values of a parameter in memory, see `gradients.in_memory`."""

    shards: Shards
    unit: Unit

    @contextmanager
    def held(self, changed: bool) -> Iterator[None]:
        self.shards.pin(self.unit)
        try:
            yield
        finally:
            self.unit.changed |= changed
            self.shards.unpin(self.unit)


def divide(model: nn.Module, team: Team, device: torch.device) -> Shards:
    """Divide the parameters of a model among the processes of a team. The values are those of process 0.

    All processes call this function together. The parameters of the model are replaced, and the former ones are freed
    before the next unit is divided. Its buffers are moved to the device.

    Args:
        model: The model, on the CPU. In the processes other than the first, its tensors may be on the device "meta".
        team: The processes.
        device: The device on which this process computes.

    Returns:
        The units of the model.

    Raises:
        UnsupportedModelError: A parameter is not an ordinary floating-point tensor, or the processes have different
            models.
    """
    _check_ordinary(model)
    _check_equal(model, team)
    shards, places, units = Shards(team), _places(model), dict[str, Unit]()
    blocks = _blocks(model)
    holders = _holders(model, places, blocks)
    for names in holders.values():
        for group in _by_dtype(model, [name for name in names if name not in units]):
            unit = shards.add([model.get_parameter(name) for name in group], device)
            for name, parameter in zip(group, unit.parameters, strict=True):
                for place in places[name]:
                    module, _, local = place.rpartition(".")
                    setattr(model.get_submodule(module), local, parameter)
            units |= dict.fromkeys(group, unit)
    for module, names in holders.items():
        needed = list(dict.fromkeys(units[name] for name in names))
        shards.watch(module, model.get_submodule(module), needed, module in blocks)
    for each in model.modules():
        for local, buffer in each._buffers.items():
            if buffer is not None:
                values = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                each._buffers[local] = team.broadcast(values) if values.numel() else values
    team.keep([unit.shard for unit in shards.units])
    return shards


def _places(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of all places of each parameter, by the first of them."""
    first: dict[nn.Parameter, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(first.setdefault(parameter, name), []).append(name)
    return found


def _holders(model: nn.Module, places: dict[str, list[str]], blocks: Sequence[str]) -> dict[str, list[str]]:
    """Return the parameters, by first name, that each module needs in memory while it is called."""
    found: dict[str, list[str]] = {}
    for name, all_places in places.items():
        for place in all_places:
            holder = place.rpartition(".")[0]
            while isinstance(model.get_submodule(holder), nn.ParameterList | nn.ParameterDict):
                holder = holder.rpartition(".")[0]
            block = next((block for block in blocks if f"{holder}.".startswith(f"{block}.")), holder)
            found.setdefault(block, []).append(name)
    return {module: list(dict.fromkeys(names)) for module, names in found.items()}


def _blocks(model: nn.Module) -> list[str]:
    """Return the names of the blocks: modules that transformers does not split, or else the entries of lists."""
    unsplit = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found: list[str] = []

    def visit(name: str, module: nn.Module, listed: bool) -> None:
        is_block = type(module).__name__ in unsplit or (listed and not unsplit)
        if name and (is_block or isinstance(module, nn.MultiheadAttention)):
            found.append(name)
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child, type(module) is nn.ModuleList)

    visit("", model, listed=False)
    return found


def _by_dtype(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    groups: dict[torch.dtype, list[str]] = {}
    for name in names:
        groups.setdefault(model.get_parameter(name).dtype, []).append(name)
    return list(groups.values())


def _check_ordinary(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            raise UnsupportedModelError(
                f"parameter {name!r} is a {type(parameter).__name__} of {parameter.dtype}, which cannot be divided "
                "among processes: set executor.devices_per_model to 1".replace("torch.", "")
            )


def _check_equal(model: nn.Module, team: Team) -> None:
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    text = repr([(name, tuple(value.shape), value.dtype) for name, value in tensors])
    digest = hashlib.sha256(text.encode()).hexdigest()
    if team.total(torch.tensor(team.text(digest) != digest).int()) > 0:
        raise UnsupportedModelError(
            "the processes of a worker have different models: return a model of the same parameters each time the task "
            "is loaded"
        )
