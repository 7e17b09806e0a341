"""Uses of parameters outside the modules that own them, and operations whose sizes or order depend on values.

Rows are computed at the calls of modules. A use of a parameter at another place, such as `F.linear(x, self.weight)`,
has no rows. A module that is called with chosen or reordered parts of the batch has rows that may belong to other
examples, in some batches and not in others. The mode in this file sees all torch functions that a model calls in
Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SIZES = frozenset(
    ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "item", "tolist", "__int__", "__index__")
)
"""Functions that yield a size which depends on values, and `where` and `[]` with a mask."""
_CHOICES = frozenset(("__getitem__", "index_select", "gather", "take_along_dim", "sort", "topk"))
"""Functions that choose or reorder entries of an axis by values."""
_FACTS = frozenset(
    ("size", "dim", "stride", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "is_contiguous")
)
"""Methods that do not read the values of a tensor, like all getters but those of `_VALUES`."""
_VALUES = frozenset(("data", "T", "mT", "H", "mH", "real", "imag", "grad"))


class _Kind(Enum):
    """What is looked for in a call of a function. Every function of a model is called through the mode, so that this is
    looked up once for each function."""

    FACT = auto()
    SIZE = auto()
    CHOICE = auto()
    OTHER = auto()


_kinds: dict[Any, _Kind] = {}


class ParameterUses(TorchFunctionMode):
    """Records which parameters are used while none of the modules that own them is called.

    Attributes:
        outside: Names of these parameters.
        has_dynamic_sizes: Whether an operation was called whose output has a size that depends on values.
        is_reordered: Whether entries of the first axis of an activation were chosen or reordered by values.
    """

    def __init__(self, owners: Mapping[int, tuple[str, frozenset[str]]], n_examples: int) -> None:
        """
        Args:
            owners: The name of each parameter, and the names of the modules that own it, by `id` of the parameter.
            n_examples: Number of examples in the batch.
        """
        super().__init__()
        self._owners, self._n_examples, self._active = owners, n_examples, list[str]()
        self.outside: set[str] = set()
        self.has_dynamic_sizes = self.is_reordered = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = _kinds.get(func)
        if kind is None:
            kind = _kinds.setdefault(func, _kind(func))
        if kind is _Kind.FACT:
            return func(*args, **(kwargs or {}))
        if kind is not _Kind.OTHER:
            self._observe(kind, func.__name__, args, kwargs or {})
        values: Iterable[Any] = (*args, *kwargs.values()) if kwargs else args
        for value in values:
            if id(value) in self._owners:
                self._use(value)
            elif type(value) in (list, tuple):
                for inner in value:
                    if id(inner) in self._owners:
                        self._use(inner)
        return func(*args, **(kwargs or {}))

    def _use(self, parameter: Any) -> None:
        name, owners = self._owners[id(parameter)]
        if owners.isdisjoint(self._active):
            self.outside.add(name)

    def _observe(self, kind: _Kind, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if kind is _Kind.SIZE or (name == "where" and len(args) + len(kwargs) == 1) or _is_masked(name, args):
            self.has_dynamic_sizes = True
        if name in _CHOICES and self._reorders(name, args, kwargs):
            self.is_reordered = True

    def _reorders(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        value = args[0] if args else None
        if not isinstance(value, Tensor) or not value.requires_grad or not value.dim():
            return False
        if value.shape[0] == 1 or value.shape[0] % self._n_examples:
            return False
        if name == "__getitem__":
            index = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
            index = torch.tensor(index) if isinstance(index, list) else index
            if not isinstance(index, Tensor):
                return False
        else:
            index = kwargs.get("index", args[-1])
            if kwargs.get("dim", args[1] if len(args) > 1 else None) not in (0, -value.dim()):
                return False
        if not isinstance(index, Tensor) or index.dtype == torch.bool or index.numel() != value.shape[0]:
            return True
        with torch._C.DisableTorchFunction():
            return not torch.equal(index.flatten(), torch.arange(len(value), device=index.device))

    @contextmanager
    def following(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Follow the calls of the owners, and observe the functions that are called inside the context."""
        handles = []
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(self._entered(name), prepend=True))
            handles.append(module.register_forward_hook(self._left, always_call=True))
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str) -> Callable[..., None]:
        return lambda *_: self._active.append(name)

    def _left(self, *_: Any) -> None:
        self._active.pop()


def _is_masked(name: str, args: tuple[Any, ...]) -> bool:
    if name != "__getitem__":
        return False
    return any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in _flat(args[1:]))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _kind(func: Any) -> _Kind:
    name = getattr(func, "__name__", "")
    if name in _FACTS or (name == "__get__" and getattr(func.__self__, "__name__", "") not in _VALUES):
        return _Kind.FACT
    if name in _SIZES:
        return _Kind.SIZE
    return _Kind.CHOICE if name in _CHOICES or name == "where" else _Kind.OTHER
