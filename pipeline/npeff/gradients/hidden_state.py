"""State of a model that a forward pass changes, such as a counter of its calls.

A model whose behaviour depends on such a state may give the rows of one batch to other examples than those of another
batch, and nothing in the batch tells so. The state that is seen: attributes of the modules and of their classes, global
variables and closures that their methods use, the entries of small tensors, changes in place of larger ones, and the
random numbers of Python, NumPy and torch.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_TORCH = frozenset(nn.Module().__dict__) - {"training"}
"""Attributes of every module. The modules, parameters and buffers among them are visited apart."""
_MOST_ENTRIES = 64
"""Number of entries of a container or tensor up to which its content is compared."""
_DEPTH = 3


class StateReader:
    """Reads the state of a model.

    Args:
        model: The model. Its modules are those of the time of this call.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        classes = {kind for module in self._modules for kind in type(module).__mro__ if not _is_of_torch(kind)}
        self._classes = sorted(classes, key=lambda kind: (kind.__module__, kind.__qualname__))
        self._variables, self._cells = list[tuple[dict[str, Any], str]](), list[CellType]()
        for function in (each for kind in self._classes for each in vars(kind).values()):
            if isinstance(function, FunctionType):
                names = sorted(set(function.__code__.co_names) & function.__globals__.keys())
                self._variables += [(function.__globals__, name) for name in names]
                self._cells += function.__closure__ or ()

    def read(self) -> tuple[Any, ...]:
        """Return the state in a form that can be compared with that of another time by ``==``."""
        seen: set[int] = set()
        found: list[Any] = []
        for module in self._modules:
            found += [_value(value, seen, _DEPTH) for name, value in vars(module).items() if name not in _OF_TORCH]
            found += [(id(tensor), _changes(tensor)) for tensor in module._buffers.values()]
        for kind in self._classes:
            found += [_constant(value) for value in vars(kind).values()]
        found += [_constant(variables.get(name)) for variables, name in self._variables]
        found += [_constant(value) for value in _contents(self._cells)]
        # the state of NumPy's generator is a tuple with an array
        name, key, *places = np.random.get_state(legacy=True)
        found += [hash(random.getstate()), name, np.asarray(key).tobytes(), tuple(places)]
        found.append(torch.get_rng_state().numpy().tobytes())
        return tuple(found)


def _is_of_torch(kind: type) -> bool:
    return kind is object or kind.__module__.partition(".")[0] in ("torch", "typing", "abc")


def _contents(cells: Sequence[CellType]) -> Iterator[Any]:
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            yield None


def _constant(value: Any) -> Any:
    """Return a class attribute or a variable; None for functions, modules, classes and other objects."""
    if isinstance(value, (*_PLAIN, list, dict, set, count, Tensor)):
        return _value(value, set(), 2)
    return None


def _value(value: Any, seen: set[int], depth: int) -> Any:
    """Return a value in a form that can be compared. Objects that have been seen in this reading count as equal."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return _changes(value)
    if isinstance(value, nn.Module | type | FunctionType) or depth == 0 or id(value) in seen:
        return None
    seen.add(id(value))
    if isinstance(value, Mapping):
        return _entries(
            [each for pair in list(value.items())[:_MOST_ENTRIES] for each in pair], len(value), seen, depth
        )
    if isinstance(value, list | tuple | set | frozenset | deque):
        return _entries(list(value)[:_MOST_ENTRIES], len(value), seen, depth)
    if isinstance(value, count):
        return repr(value)
    if isinstance(value, random.Random):
        return hash(value.getstate())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.ndarray | np.generic):
        return value.tobytes() if value.size <= _MOST_ENTRIES else None
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, Iterator):
        return _Advanced()
    return _entries(list(getattr(value, "__dict__", {}).values()), 0, seen, depth)


def _entries(values: Sequence[Any], size: int, seen: set[int], depth: int) -> Any:
    return (size, *(_value(each, seen, depth - 1) for each in values))


def _changes(tensor: Tensor | None) -> Any:
    """Return the content of a small tensor, and the number of changes in place of another one."""
    if tensor is None or tensor.is_meta or tensor.layout != torch.strided or tensor.is_nested:
        return None
    if tensor.numel() <= _MOST_ENTRIES:
        return str(tensor.tolist())
    # a stored output of the pass is another tensor every time, which changes nothing
    return None if tensor.is_inference() else tensor._version


class _Advanced:
    """The state of an iterator, which cannot be read: no two are equal."""
