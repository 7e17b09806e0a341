"""Uses of parameters outside the modules that own them, and what decides the order of the examples.

Rows are computed at the calls of modules. A use of a parameter at another place, such as `F.linear(x, self.weight)`,
has no rows. A module that is called with chosen or reordered parts of the batch has rows that may belong to other
examples, in some batches and not in others (`steering.py`). The mode in this file sees all torch functions that a model
calls in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

from npeff.gradients.steering import Kind, decided, kind_of, read

_kinds: dict[Any, Kind] = {}


class ParameterUses(TorchFunctionMode):
    """Records which parameters are used while none of the modules that own them is called.

    Attributes:
        outside: Names of these parameters.
        steering: What decided where the entries of the first axis went, in a form that can be compared with other
            batches. Empty for a single example.
    """

    def __init__(
        self, owners: Mapping[int, tuple[str, frozenset[str]]], n_examples: int, n_experts: Container[int] = ()
    ) -> None:
        """
        Args:
            owners: The name of each parameter, and the names of the modules that own it, by `id` of the parameter.
            n_examples: Number of examples in the batch.
            n_experts: Numbers of experts of the layers of experts.
        """
        super().__init__()
        self._owners, self._n_examples, self._n_experts = owners, n_examples, n_experts
        self._active = list[str]()
        self.outside: set[str] = set()
        self.steering: list[Hashable] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kind = _kinds.get(func)
        if kind is None:
            kind = _kinds.setdefault(func, kind_of(func))
        if kind is Kind.FACT:
            return func(*args, **(kwargs or {}))
        values: Iterable[Any] = (*args, *kwargs.values()) if kwargs else args
        for value in values:
            if id(value) in self._owners:
                self._use(value)
            elif type(value) in (list, tuple):
                for inner in value:
                    if id(inner) in self._owners:
                        self._use(inner)
        result = func(*args, **(kwargs or {}))
        if kind is not Kind.ROWWISE and self._n_examples > 1:
            if kind is Kind.READ:
                self.steering.append(read(result))
            else:
                found = decided(kind, func, args, kwargs or {}, self._n_examples, self._n_experts)
                if found is not None:
                    self.steering.append(found)
        return result

    def _use(self, parameter: Any) -> None:
        name, owners = self._owners[id(parameter)]
        if owners.isdisjoint(self._active):
            self.outside.add(name)

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
