"""What one parameter contributes to the Fisher factors of a batch, kept in the form in which it is cheapest.

A row of a Fisher factor is a gradient. For a layer that multiplies its inputs by a weight, the weight's part of it is
Σ_t δ_t ⊗ a_t, with a_t the layer's input at position t and δ_t the gradient at its output; it need not be formed for
its inner products (`gram`) or for its sketch. Every form has the same face:

    dense()             rows (B, R, *shape), formed
    gram()              (B, R, R), float64: inner products of the rows of each example
    add_weighted_sum    to (K, *shape): Σ_{b,r} w[k,b,r] row[b,r]
    examples(which)     the same for a part of the batch, given by a slice or a mask

Legend: B batch, R rank, T positions, G groups of a convolution, o outputs and i inputs of a group, V rows of an
embedding, K components.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

# Temporaries are kept near this many numbers by working on blocks of examples: in memory, and within a core's cache.
MEMORY_ELEMENTS, CACHE_ELEMENTS = 1 << 25, 1 << 19

_PART_ELEMENTS = 1 << 18
"""Numbers of rows formed at a time for a part of a parameter on a CPU: more, and each leaves the cache before it is
used; fewer, and the products become narrow."""


class Contribution(Protocol):
    """One parameter's part of the rows of the Fisher factors of a batch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""

    @property
    def n_examples(self) -> int:
        """B."""

    @property
    def rank(self) -> int:
        """R."""

    def new_zeros(self, *shape: int) -> Tensor:
        """Zeros of the rows' precision, on their device."""

    def dense(self) -> Tensor: ...

    def gram(self) -> Tensor: ...

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        """In place; `total` (K, *shape), contiguous."""

    def examples(self, which: slice | Tensor) -> Self: ...


AnyContribution = TypeVar("AnyContribution", bound=Contribution)


def cached_elements(device: torch.device) -> int:
    """Numbers to work on at a time where each is read once: what stays in the cache; an accelerator wants many."""
    return CACHE_ELEMENTS if device.type == "cpu" else MEMORY_ELEMENTS


def blocks(
    contribution: AnyContribution, elements_per_example: int, elements: int
) -> Iterator[tuple[int, int, AnyContribution]]:
    """Consecutive ranges of examples (start, stop, part) whose temporaries stay near `elements` numbers."""
    size = max(1, elements // max(1, elements_per_example))
    for start in range(0, contribution.n_examples, size):
        stop = min(start + size, contribution.n_examples)
        yield start, stop, contribution.examples(slice(start, stop))


def flat_blocks(contribution: Contribution, elements: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """`dense()`, a block of examples at a time, as (b, R, number of entries of the parameter)."""
    n_entries, rank = math.prod(contribution.shape), contribution.rank
    elements = cached_elements(contribution.new_zeros(0).device) if elements is None else elements
    for start, stop, part in blocks(contribution, rank * n_entries, elements):
        yield start, stop, part.dense().reshape(stop - start, rank, n_entries)


def _dense_gram(contribution: Contribution) -> Tensor:
    return torch.cat([(rows @ rows.transpose(1, 2)).double() for _, _, rows in flat_blocks(contribution)])


def _add_dense_weighted_sum(contribution: Contribution, weights_KBR: Tensor, total: Tensor) -> None:
    weights_KBR = weights_KBR.to(total)
    for start, stop, rows in flat_blocks(contribution, MEMORY_ELEMENTS):
        total.view(len(total), -1).addmm_(weights_KBR[:, start:stop].flatten(1), rows.flatten(0, 1).to(total))


@dataclass(frozen=True)
class Dense:
    """Rows as they are: biases, norms' weights, and whatever has no cheaper form."""

    rows: Tensor
    """(B, R, *shape)"""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape[2:])

    @property
    def n_examples(self) -> int:
        return self.rows.shape[0]

    @property
    def rank(self) -> int:
        return self.rows.shape[1]

    def new_zeros(self, *shape: int) -> Tensor:
        return self.rows.new_zeros(shape)

    def dense(self) -> Tensor:
        return self.rows

    def gram(self) -> Tensor:
        return _dense_gram(self)

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        _add_dense_weighted_sum(self, weights_KBR, total)

    def examples(self, which: slice | Tensor) -> Self:
        return type(self)(self.rows[which])


@dataclass(frozen=True)
class Outer:
    """Rows Σ_t δ_t ⊗ a_t, per group; the parameter, seen as a matrix, is (G o) × i.

    With `inputs_first` (G = 1) the parameter is stored as inputs × outputs: Σ_t a_t ⊗ δ_t.
    """

    deltas: tuple[Tensor, ...]
    """R tensors (B, G, T, o), as autograd gave them: they are large, and stacking them would copy them."""
    inputs_BGTi: Tensor
    shape: tuple[int, ...]
    inputs_first: bool = False
    known_live_BGT: Tensor | None = None
    """`live_BGT`, where it is known already."""

    @property
    def n_examples(self) -> int:
        return self.inputs_BGTi.shape[0]

    @property
    def rank(self) -> int:
        return len(self.deltas)

    def new_zeros(self, *shape: int) -> Tensor:
        return self.inputs_BGTi.new_zeros(shape)

    def dense(self) -> Tensor:
        rows_BRx = self.new_zeros(self.n_examples, self.rank, math.prod(self.shape))
        for row, deltas_BGTo in enumerate(self.deltas):
            rows_BGoi = deltas_BGTo.transpose(2, 3) @ self.inputs_BGTi
            rows_BRx[:, row] = (rows_BGoi.transpose(2, 3) if self.inputs_first else rows_BGoi).flatten(1)
        return rows_BRx.unflatten(2, self.shape)

    def gram(self) -> Tensor:
        """Σ_{t,u} (δ_t·δ_u)(a_t·a_u) where that is less work than forming the rows, else from the rows."""
        return outer_gram([self])

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        """Weights into the deltas first, then one product over examples and positions, where that is less work; else
        rows are formed, for a part of the parameter at a time that stays in the cache."""
        K, R = len(weights_KBR), self.rank
        T, i = self.inputs_BGTi.shape[2:]
        if K * T * (R + i) < i * R * (T + K):
            self._add_by_positions(weights_KBR.to(total), total)
        else:
            self._add_by_rows(weights_KBR.to(total).flatten(1), total.flatten(1))

    def _add_by_positions(self, weights_KBR: Tensor, total: Tensor) -> None:
        K = len(weights_KBR)
        _, G, T, o = self.deltas[0].shape
        total_KGoi = total.view(K, G, -1, o).mT if self.inputs_first else total.view(K, G, o, -1)
        for start, stop, part in blocks(self, K * G * T * o, MEMORY_ELEMENTS):
            deltas_GKoBT = total.new_zeros(G, K, o, stop - start, T)
            for row, deltas_BGTo in enumerate(part.deltas):
                weights_KB = weights_KBR[:, start:stop, row]
                deltas_GKoBT += weights_KB[:, None, :, None] * deltas_BGTo.permute(1, 3, 0, 2)[:, None]
            found = deltas_GKoBT.flatten(3).flatten(1, 2) @ part.inputs_BGTi.transpose(0, 1).flatten(1, 2).to(total)
            total_KGoi += found.unflatten(1, (K, o)).transpose(0, 1)

    def _add_by_rows(self, weights_Kn: Tensor, total_Kx: Tensor) -> None:
        R, (B, G, T, _) = self.rank, self.deltas[0].shape[:4]
        most = _PART_ELEMENTS if total_Kx.device.type == "cpu" else MEMORY_ELEMENTS
        for group in range(G):
            deltas_BRTo = torch.stack([deltas_BGTo[:, group] for deltas_BGTo in self.deltas], dim=1).to(total_Kx)
            inputs_BTi = self.inputs_BGTi[:, group].to(total_Kx)
            # the left factor is cut up: it lies so that each of its parts is read through
            left = (inputs_BTi[:, None] if self.inputs_first else deltas_BRTo).mT.contiguous()
            n_left, n_right = left.shape[2], (deltas_BRTo if self.inputs_first else inputs_BTi).shape[-1]
            for start in range(0, n_left, step := max(1, most // (B * R * n_right))):
                part = left[:, :, start : start + step]
                rows = part @ deltas_BRTo if self.inputs_first else part.reshape(B, -1, T) @ inputs_BTi
                first = (group * n_left + start) * n_right
                rows_nx = rows.reshape(B * R, -1)
                total_Kx[:, first : first + rows_nx.shape[1]].addmm_(weights_Kn, rows_nx)

    def examples(self, which: slice | Tensor) -> Self:
        deltas = tuple(deltas_BGTo[which] for deltas_BGTo in self.deltas)
        return type(self)(deltas, self.inputs_BGTi[which], self.shape, self.inputs_first)

    def live_BGT(self) -> Tensor:
        """Positions at which any of an example's deltas is not zero."""
        return live_positions(self.deltas) if self.known_live_BGT is None else self.known_live_BGT

    def inputs_key(self) -> Hashable:
        """Equal for layers that read the same inputs: the query, key and value of attention."""
        inputs = self.inputs_BGTi
        return inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype


def _forming_is_cheaper(outer: Outer) -> bool:
    T, o = outer.deltas[0].shape[2:]
    R, i = outer.rank, outer.inputs_BGTi.shape[-1]
    return T * (T * (i + R * o) + R * R * o) >= R * o * i * (T + R)


_TELLING = 16
"""Features that nearly always tell whether a position is live: the others are looked at only where these are zero."""


def live_positions(deltas: Sequence[Tensor]) -> Tensor:
    """Where any of R rows has a gradient that is not zero: R tensors (…, o) -> (…)."""
    live = _any_nonzero([delta[..., :_TELLING] for delta in deltas])
    if deltas[0].shape[-1] > _TELLING and not live.all():
        rest = ~live
        live[rest] = _any_nonzero([delta[rest] for delta in deltas])
    return live


def _any_nonzero(deltas: Sequence[Tensor]) -> Tensor:
    live = deltas[0].abs().amax(-1).ne(0)
    for delta in deltas[1:]:
        live |= delta.abs().amax(-1).ne(0)
    return live


def direction_products(contribution: Contribution, directions_Kx: Tensor) -> Tensor:
    """(B, R, K): inner products of the rows with K directions, (K, *shape)."""
    if isinstance(contribution, Sum):
        return torch.stack([direction_products(part, directions_Kx) for part in contribution.parts]).sum(0)
    if isinstance(contribution, Rows):
        looked_up_KBTi = directions_Kx[:, contribution.indices_BT]
        return torch.einsum("btri,kbti->brk", contribution.deltas_BTRi, looked_up_KBTi)
    directions_xK = directions_Kx.flatten(1).T if directions_Kx.dim() > 1 else directions_Kx[None]
    # in large blocks, as each reads all directions
    return torch.cat([rows_bRx @ directions_xK for _, _, rows_bRx in flat_blocks(contribution, MEMORY_ELEMENTS)])


def with_same_inputs(contributions: Iterable[Contribution]) -> tuple[list[list[Outer]], list[Contribution]]:
    """The parts of `contributions`: outer products, put together where they read the same inputs, and all others."""
    outers: dict[Hashable, list[Outer]] = {}
    others: list[Contribution] = []
    for contribution in contributions:
        if isinstance(contribution, Outer):
            outers.setdefault(contribution.inputs_key(), []).append(contribution)
        else:
            others.append(contribution)
    return list(outers.values()), others


def total_gram(contributions: Iterable[Contribution]) -> Tensor:
    """(B, R, R), float64: the Gram matrices of all parameters' rows together, A Aᵀ."""
    groups, others = with_same_inputs(contributions)
    return torch.stack([*map(outer_gram, groups), *(part.gram() for part in others)]).sum(0)


def outer_gram(outers: Sequence[Outer]) -> Tensor:
    """The sum of the Gram matrices of layers that read the same inputs a_t.

    Σ_{t,u} (a_t·a_u)(δ_t·δ_u), with the inputs' inner products taken once, or from the rows where that is less work.
    """
    first = outers[0]
    B, G, T = first.inputs_BGTi.shape[:3]
    R = first.rank
    formed = [part for part in outers if _forming_is_cheaper(part)]
    grams_BRR = torch.zeros(B, R, R, dtype=torch.float64, device=first.inputs_BGTi.device)
    for part in formed:
        grams_BRR += _dense_gram(part)
    small = [part for part in outers if not any(part is other for other in formed)]
    if not small:
        return grams_BRR
    if R == 1:
        return grams_BRR + _squared_norms(small)[:, None, None]
    width = max(part.deltas[0].shape[-1] for part in small)
    for start, stop, inputs in blocks(first, G * T * (T + R * width), cached_elements(first.inputs_BGTi.device)):
        products_BGTT = inputs.inputs_BGTi @ inputs.inputs_BGTi.mT
        for part in small:
            deltas = [deltas_BGTo[start:stop] for deltas_BGTo in part.deltas]
            for row, deltas_BGTo in enumerate(deltas):
                mixed_BGTo = products_BGTT @ deltas_BGTo
                for column in range(row, R):
                    values_B = (mixed_BGTo * deltas[column]).sum((1, 2, 3)).double()
                    grams_BRR[start:stop, row, column] += values_B
                    if row != column:
                        grams_BRR[start:stop, column, row] += values_B
    return grams_BRR


_STRIP = 32
"""Positions of which the inner products with all before them are taken at a time."""


def _squared_norms(outers: Sequence[Outer]) -> Tensor:
    """(B,), float64: `outer_gram` of one row, Σ_{t,u} (a_t·a_u)(δ_t·δ_u), of which t < u is half of t ≠ u."""
    inputs_BGTi = outers[0].inputs_BGTi
    squares_B = torch.zeros(len(inputs_BGTi), dtype=torch.float64, device=inputs_BGTi.device)
    for start in range(0, inputs_BGTi.shape[2], _STRIP):
        strip, until = slice(start, start + _STRIP), slice(0, start + _STRIP)
        products_BGtu = inputs_BGTi[:, :, strip] @ inputs_BGTi[:, :, until].mT
        deltas_BGtu = sum(part.deltas[0][:, :, strip] @ part.deltas[0][:, :, until].mT for part in outers)
        products_BGtu *= deltas_BGtu
        squares_B += 2 * products_BGtu[..., :start].sum((1, 2, 3)).double()
        squares_B += products_BGtu[..., start:].sum((1, 2, 3)).double()
    return squares_B


@dataclass(frozen=True)
class Rows:
    """Rows Σ_t e_{index_t} ⊗ δ_t: an embedding. Only the rows of the table that were looked up are ever touched."""

    deltas_BTRi: Tensor
    indices_BT: Tensor
    shape: tuple[int, ...]

    @property
    def n_examples(self) -> int:
        return self.deltas_BTRi.shape[0]

    @property
    def rank(self) -> int:
        return self.deltas_BTRi.shape[2]

    def new_zeros(self, *shape: int) -> Tensor:
        return self.deltas_BTRi.new_zeros(shape)

    def _slots(self) -> Tensor:
        """Position of each use in the tables of all examples, one table after the other."""
        tables_B = torch.arange(self.n_examples, device=self.indices_BT.device) * self.shape[0]
        return (self.indices_BT + tables_B[:, None]).flatten()

    def dense(self) -> Tensor:
        B, _, R, i = self.deltas_BTRi.shape
        rows = self.new_zeros(B * self.shape[0], R, i)
        rows.index_add_(0, self._slots(), self.deltas_BTRi.flatten(0, 1))
        return rows.view(B, -1, R, i).transpose(1, 2)

    def gram(self) -> Tensor:
        """Uses of the same table row by the same example are added up first; what is left has disjoint support."""
        B, _, R, i = self.deltas_BTRi.shape
        distinct_n, place = self._slots().unique(return_inverse=True)
        sums_nRi = self.new_zeros(len(distinct_n), R, i)
        sums_nRi.index_add_(0, place, self.deltas_BTRi.flatten(0, 1))
        grams = torch.zeros(B, R, R, dtype=torch.float64, device=sums_nRi.device)
        return grams.index_add_(0, distinct_n // self.shape[0], (sums_nRi @ sums_nRi.transpose(1, 2)).double())

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        for weights_BR, component in zip(weights_KBR.to(total), total, strict=True):
            deltas_BTi = torch.einsum("br,btri->bti", weights_BR, self.deltas_BTRi.to(total))
            component.index_add_(0, self.indices_BT.flatten(), deltas_BTi.flatten(0, 1))

    def examples(self, which: slice | Tensor) -> Self:
        return type(self)(self.deltas_BTRi[which], self.indices_BT[which], self.shape)


@dataclass(frozen=True)
class Sum:
    """A parameter used in ways of different form, such as an embedding that is also the output layer."""

    parts: tuple[Contribution, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0].shape

    @property
    def n_examples(self) -> int:
        return self.parts[0].n_examples

    @property
    def rank(self) -> int:
        return self.parts[0].rank

    def new_zeros(self, *shape: int) -> Tensor:
        return self.parts[0].new_zeros(*shape)

    def dense(self) -> Tensor:
        total = self.parts[0].dense()
        for part in self.parts[1:]:
            total = total + part.dense()
        return total

    def gram(self) -> Tensor:
        return _dense_gram(self)

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        for part in self.parts:
            part.add_weighted_sum(weights_KBR, total)

    def examples(self, which: slice | Tensor) -> Self:
        return type(self)(tuple(part.examples(which) for part in self.parts))


def add(contributions: Sequence[Contribution]) -> Contribution:
    """The sum of a parameter's uses, in one form where they share it: uses of a layer are more positions of one use."""
    outers = [part for part in contributions if isinstance(part, Outer)]
    rows = [part for part in contributions if isinstance(part, Rows)]
    denses = [part for part in contributions if isinstance(part, Dense)]
    parts: list[Contribution] = [part for part in contributions if isinstance(part, Sum)]
    for kind in dict.fromkeys((part.inputs_first, part.inputs_BGTi.shape[1]) for part in outers):
        same = [part for part in outers if (part.inputs_first, part.inputs_BGTi.shape[1]) == kind]
        if len(same) == 1:
            parts += same
            continue
        joined = tuple(torch.cat(row, dim=2) for row in zip(*(part.deltas for part in same), strict=True))
        inputs = torch.cat([part.inputs_BGTi for part in same], dim=2)
        parts.append(Outer(joined, inputs, same[0].shape, same[0].inputs_first))
    if rows:
        deltas = torch.cat([part.deltas_BTRi for part in rows], dim=1)
        parts.append(Rows(deltas, torch.cat([part.indices_BT for part in rows], dim=1), rows[0].shape))
    if denses:
        total = denses[0].rows
        for part in denses[1:]:
            total = total + part.rows
        parts.append(Dense(total))
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))
