"""What decides where the entries of the first axis of an activation go: numbers that a model reads from tensors, index
tensors, matrices that multiply the axis of examples, and functions that reverse or roll it.

A model that sorts, routes or flattens examples by their values gives the rows of a module's output to other examples in
one batch than in another. Every way in which values can do that contains one of these things. Two batches in which a
model reads the same numbers are treated alike, all else being equal. A batch whose examples are reordered is like no
other, because a mask may choose between the orders. Functions that are not known to keep the order of the first axis
count as functions that may change it.

Legend: B batch.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from enum import Enum, auto
from itertools import count
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Kind(Enum):
    """What is looked for in a call of a function. Every function of a model is called through the mode, so that this is
    looked up once for each function."""

    FACT = auto()
    """The function reads no values."""
    ROWWISE = auto()
    """No argument can change the order of the entries of the first axis."""
    READ = auto()
    """The result is a Python object."""
    INDEX = auto()
    """The `[]` operator, with or without assignment."""
    ORDER = auto()
    """The function sorts."""
    SHIFT = auto()
    """The function reverses or rolls axes."""
    PRODUCT = auto()
    """A matrix product."""
    SUM = auto()
    """`einsum`."""
    OTHER = auto()
    """A tensor of integers or of truth values may choose entries of an axis."""


class Unknown:
    """Decides in a way that cannot be compared with other batches. Each instance has a hash of its own."""

    _count = count()

    def __init__(self) -> None:
        self._number = next(self._count)

    def __hash__(self) -> int:
        return hash(("unknown", self._number))  # the default one is that of the address, which is used again


_FACTS = frozenset(
    ("size", "dim", "stride", "numel", "nelement", "is_floating_point", "is_complex", "element_size", "is_contiguous")
)
"""Methods that do not read the values of a tensor, like all getters but those of `_VALUES`."""
_VALUES = frozenset(("data", "T", "mT", "H", "mH", "real", "imag", "grad"))
_READS = frozenset((
    "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__contains__",
    "equal", "allclose", "is_nonzero",
))  # fmt: skip
_ORDERS = frozenset(("sort", "msort", "topk", "kthvalue"))
_SHIFTS = frozenset(("flip", "fliplr", "flipud", "roll", "rot90"))
_PRODUCTS = frozenset(("matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "tensordot", "inner"))
_ELEMENTWISE = frozenset((
    "add", "sub", "rsub", "mul", "multiply", "div", "divide", "truediv", "floordiv", "true_divide",
    "floor_divide", "mod", "remainder", "fmod", "pow", "float_power", "eq", "ne", "lt", "gt", "le", "ge",
    "maximum", "minimum", "fmax", "fmin", "masked_fill", "addcmul", "addcdiv", "lerp", "logical_and",
    "logical_or", "logical_xor", "and", "or", "xor", "clamp", "copysign", "where", "copy", "to", "type_as",
    "view_as", "reshape_as", "expand_as", "scaled_dot_product_attention", "multi_head_attention_forward",
    "cross_entropy", "nll_loss", "cat", "stack",
))  # fmt: skip
"""Functions that keep the order of the first axis although their arguments may be truth values or integers. Names of
operators have no underscores here."""
_ALONG_AXIS = frozenset((
    "index_select", "gather", "take_along_dim", "index_add", "index_copy", "index_fill", "index_reduce",
    "scatter", "scatter_add", "scatter_reduce", "repeat_interleave",
))  # fmt: skip
"""Functions whose index tensors apply to one axis, which is the first integer among the arguments, or `dim`."""
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def kind_of(func: Any) -> Kind:
    """Return the kind of a function that torch passes to a function mode."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return Kind.FACT if getattr(func.__self__, "__name__", "") not in _VALUES else Kind.ROWWISE
    if name in _FACTS:
        return Kind.FACT
    if name in _READS:
        return Kind.READ
    if name in ("__getitem__", "__setitem__"):
        return Kind.INDEX
    bare = name.strip("_")
    if bare in _ORDERS:
        return Kind.ORDER
    if bare in _SHIFTS:
        return Kind.SHIFT
    if bare == "einsum":
        return Kind.SUM
    if bare in _PRODUCTS or bare in ("rmatmul", "imatmul"):
        return Kind.PRODUCT
    is_operator = name.startswith("__")
    return Kind.ROWWISE if bare in _ELEMENTWISE or (is_operator and bare[1:] in _ELEMENTWISE) else Kind.OTHER


def given(batch: Any, n_examples: int) -> Hashable:
    """Return what a batch contains besides tensors with B entries on the first axis, in a form that can be compared.

    These are Python objects, and the shapes of tensors with another first axis, such as the points of all examples.
    """
    found: list[Hashable] = []
    leaves = pytree.tree_leaves(batch, is_leaf=lambda value: isinstance(value, Mapping))
    for leaf in leaves:
        if isinstance(leaf, Mapping):
            found += [(key, given(value, n_examples)) for key, value in leaf.items()]
        elif isinstance(leaf, Tensor):
            if leaf.layout != torch.strided or leaf.is_nested:
                found.append(Unknown())
            elif leaf.shape[:1] != (n_examples,):
                found.append(tuple(leaf.shape))
        else:
            found.append(_python(leaf))
    return tuple(value for value in found if value not in (None, ()))


def decided(
    kind: Kind,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    n_examples: int,
    n_experts: Container[int] = (),
) -> Hashable:
    """Return what a call contains that decides where the entries of the axis of examples go; None if nothing does.

    The result of a call of the kind `READ` decides, see `read`.

    Args:
        kind: Kind of the function.
        func: The function.
        args: Its arguments.
        kwargs: Its named arguments.
        n_examples: B.
        n_experts: Numbers of experts among which the model chooses for each token.
    """
    if kind is Kind.INDEX:
        return _indexed(args, n_examples)
    values = list(_flat((*args, *kwargs.values())))
    active = [value for value in values if isinstance(value, Tensor) and value.requires_grad]
    if not active:
        return None
    name = func.__name__.strip("_")
    if kind is Kind.SUM:
        return _summed(values, n_examples)
    if kind is Kind.PRODUCT:
        return _multiplied(name, values, n_examples)
    if kind is Kind.ORDER:
        axis = _axis(args[2:] if name == "topk" else args[1:], kwargs, 0 if name == "msort" else -1)
        return Unknown() if _orders_examples(active[0], axis, n_examples, n_experts) else None
    if kind is Kind.SHIFT:
        return _shifted(name, active[0], args[1:], kwargs, n_examples)
    chosen = [value for value in values if isinstance(value, Tensor) and _is_discrete(value)]
    axis = _axis(args, kwargs, 0)
    if chosen and name in _ALONG_AXIS and not _orders_examples(active[0], axis, n_examples, n_experts):
        return None
    return Unknown() if chosen else None


def read(result: Any) -> Hashable:
    """Return the result of a function of the kind `READ` in a form that can be compared."""
    return _python(result)


def _python(value: Any) -> Hashable:
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if isinstance(value, _PLAIN):
        plain: Hashable = value
        return plain
    if isinstance(value, list):
        return tuple(_python(inner) for inner in value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value.shape, value.tobytes()
    return Unknown()


def _is_discrete(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def _shifted(name: str, value: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any], n_examples: int) -> Hashable:
    """Return what decides in a function that reverses or rolls axes."""
    if name in ("flip", "roll"):
        given = kwargs.get("dims", args[1:] if name == "roll" else args)
        axes = [axis for axis in _flat(given if isinstance(given, list | tuple) else [given]) if isinstance(axis, int)]
    else:
        axes = [1] if name == "fliplr" else [0, 1]
    # without axes, the flattened tensor is rolled
    moved = any(_holds_examples(value, axis, n_examples) for axis in axes or [0])
    return Unknown() if moved else None


def _axis(args: Iterable[Any], kwargs: Mapping[str, Any], default: int) -> int:
    """Return the axis that a call names: its argument `dim`, or else its first integer."""
    found = kwargs.get("dim", next((value for value in args if type(value) is int), default))
    return found if isinstance(found, int) else default


def _holds_examples(value: Tensor, axis: int, n_examples: int) -> bool:
    """Return whether an axis of an activation may be the one of examples."""
    shape, axis = value.shape, axis % max(value.dim(), 1)
    if axis == 0 or not shape:
        return True
    return shape[axis] == n_examples or (shape[axis] % n_examples == 0 and prod(shape[:axis]) % n_examples != 0)


def _orders_examples(value: Tensor, axis: int, n_examples: int, n_experts: Container[int]) -> bool:
    """Return whether a choice along an axis may be one between examples, and not one between the experts of tokens."""
    routes = value.dim() == 2 and axis % 2 == 1 and value.shape[1] in n_experts
    of_tokens = value.shape[0] % n_examples == 0 and value.shape[0] > n_examples
    return _holds_examples(value, axis, n_examples) and not (routes and of_tokens)


def _indexed(args: Sequence[Any], n_examples: int) -> Hashable:
    """Return what decides in `value[index]` or `value[index] = other`."""
    value, index = args[0], args[1]
    if not any(isinstance(each, Tensor) and each.requires_grad for each in (value, *args[2:])):
        return None
    parts = index if isinstance(index, tuple) else (index,)
    # numbers and slices of Python come from tensors that were read, or from the batch
    if not any(_chooses(part) for part in parts):
        return None
    axis = 0
    n_axes = sum(part.dim() if _is_mask(part) else 1 for part in parts if part is not None and part is not Ellipsis)
    for part in parts:
        if part is Ellipsis:
            axis += value.dim() - n_axes
        elif _chooses(part):
            if _holds_examples(value, axis, n_examples) and not _is_identity(part, value.shape[axis]):
                return Unknown()
            axis += part.dim() if _is_mask(part) else 1
        elif part is not None:
            axis += 1
    return None


def _chooses(part: Any) -> bool:
    return isinstance(part, list | np.ndarray) or (isinstance(part, Tensor) and part.dim() > 0)


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)


def _is_identity(index: Any, size: int) -> bool:
    if not isinstance(index, Tensor) or index.numel() != size or _is_mask(index):
        return False
    with torch._C.DisableTorchFunction():
        return torch.equal(index.flatten(), torch.arange(size, device=index.device, dtype=index.dtype))


def _summed(values: Sequence[Any], n_examples: int) -> Hashable:
    """Return what decides in `einsum`."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not isinstance(values[0], str):
        return Unknown()
    terms, _, result = values[0].replace(" ", "").partition("->")
    for tensor, term in zip(tensors, terms.split(","), strict=True):
        places = [axis for axis, size in enumerate(tensor.shape) if size != 1]
        if not tensor.requires_grad or not places or "." in term or tensor.shape[places[0]] % n_examples:
            continue
        letter = term[places[0]]
        if letter not in result:
            return Unknown()
    return None


def _multiplied(name: str, values: Sequence[Any], n_examples: int) -> Hashable:
    """Return what decides in a product of two matrices, or of stacks of matrices."""
    tensors = [value for value in values if isinstance(value, Tensor)][-2:]
    if len(tensors) != 2:
        return None
    left, right = reversed(tensors) if name == "rmatmul" else tensors
    if name == "tensordot":
        return Unknown()
    if right.requires_grad and _holds_examples(right, -1 if name == "inner" or right.dim() < 2 else -2, n_examples):
        return Unknown()
    moved = left.requires_grad and left.dim() < 3 and _holds_examples(left, -1, n_examples)
    return Unknown() if moved else None
