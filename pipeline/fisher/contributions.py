"""What one parameter contributes to the Fisher factors of a batch, kept in the form in which it is cheapest.

A row of a Fisher factor is a gradient. For a layer that multiplies its inputs by a weight, the weight's part of it is
Σ_t δ_t ⊗ a_t, with a_t the layer's input at position t and δ_t the gradient at its output; it need not be formed for
its inner products (`gram`) or for its sketch. Every form has the same face:

    dense()             rows (B, R, *shape), formed
    gram()              (B, R, R), float64: inner products of the rows of each example
    weighted_sum(w_KBR) (K, *shape): Σ_{b,r} w[k,b,r] row[b,r]
    examples(which)     the same for a part of the batch, given by a slice or a mask

Legend: B batch, R rank, T positions, G groups of a convolution, o outputs and i inputs of a group, V rows of an
embedding, K components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

# Temporaries are kept near this many numbers by working on blocks of examples: in memory, and within a core's cache.
MEMORY_ELEMENTS, CACHE_ELEMENTS = 1 << 25, 1 << 19


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

    def weighted_sum(self, weights_KBR: Tensor) -> Tensor: ...

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


def _dense_weighted_sum(contribution: Contribution, weights_KBR: Tensor) -> Tensor:
    total = contribution.new_zeros(len(weights_KBR), math.prod(contribution.shape))
    weights_KBR = weights_KBR.to(total)
    for start, stop, rows in flat_blocks(contribution, MEMORY_ELEMENTS):
        total += weights_KBR[:, start:stop].flatten(1) @ rows.flatten(0, 1)
    return total.reshape(len(weights_KBR), *contribution.shape)


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

    def weighted_sum(self, weights_KBR: Tensor) -> Tensor:
        return _dense_weighted_sum(self, weights_KBR)

    def examples(self, which: slice | Tensor) -> Self:
        return type(self)(self.rows[which])


@dataclass(frozen=True)
class Outer:
    """Rows Σ_t δ_t ⊗ a_t, per group; the parameter, seen as a matrix, is (G o) × i.

    With `inputs_first` (G = 1) the parameter is stored as inputs × outputs: Σ_t a_t ⊗ δ_t.
    """

    deltas_BGTRo: Tensor
    inputs_BGTi: Tensor
    shape: tuple[int, ...]
    inputs_first: bool = False

    @property
    def n_examples(self) -> int:
        return self.deltas_BGTRo.shape[0]

    @property
    def rank(self) -> int:
        return self.deltas_BGTRo.shape[3]

    def new_zeros(self, *shape: int) -> Tensor:
        return self.deltas_BGTRo.new_zeros(shape)

    def dense(self) -> Tensor:
        B, _, _, R, o = self.deltas_BGTRo.shape
        rows_BGRoi = (self.deltas_BGTRo.flatten(3).transpose(2, 3) @ self.inputs_BGTi).unflatten(2, (R, o))
        if self.inputs_first:
            rows_BGRoi = rows_BGRoi.transpose(3, 4)
        return rows_BGRoi.transpose(1, 2).reshape(B, R, *self.shape)

    def gram(self) -> Tensor:
        """Σ_{t,u} (δ_t·δ_u)(a_t·a_u) where that is less work than forming the rows, else from the rows."""
        _, G, T, R, o = self.deltas_BGTRo.shape
        i = self.inputs_BGTi.shape[-1]
        if T * (T * (R * R * (o + 1) + i)) >= R * o * i * (T + R):
            return _dense_gram(self)
        grams = []
        for _, _, part in blocks(self, G * T * R * T * R, cached_elements(self.inputs_BGTi.device)):
            deltas, inputs = part.deltas_BGTRo.flatten(2, 3), part.inputs_BGTi
            products = (deltas @ deltas.transpose(-1, -2)).unflatten(3, (T, R)).unflatten(2, (T, R))
            products *= (inputs @ inputs.transpose(-1, -2))[:, :, :, None, :, None]
            grams.append(products.sum(dim=(1, 2, 4), dtype=torch.float64))
        return torch.cat(grams)

    def weighted_sum(self, weights_KBR: Tensor) -> Tensor:
        """Weights into the deltas first, then one product over examples and positions, where that is less work."""
        K = len(weights_KBR)
        _, G, T, R, o = self.deltas_BGTRo.shape
        i = self.inputs_BGTi.shape[-1]
        if K * T * (R + i) >= i * R * (T + K):
            return _dense_weighted_sum(self, weights_KBR)
        total = self.new_zeros(G, K * o, i)
        weights_KBR = weights_KBR.to(total)
        for start, stop, part in blocks(self, K * G * T * o, MEMORY_ELEMENTS):
            weights = weights_KBR[:, start:stop]
            deltas_GKoBT = torch.einsum("kbr,bgtro->gkobt", weights, part.deltas_BGTRo)
            total += deltas_GKoBT.flatten(3).flatten(1, 2) @ part.inputs_BGTi.transpose(0, 1).flatten(1, 2)
        total_KGoi = total.unflatten(1, (K, o)).transpose(0, 1)
        if self.inputs_first:
            total_KGoi = total_KGoi.transpose(2, 3)
        return total_KGoi.reshape(K, *self.shape)

    def examples(self, which: slice | Tensor) -> Self:
        return type(self)(self.deltas_BGTRo[which], self.inputs_BGTi[which], self.shape, self.inputs_first)


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

    def weighted_sum(self, weights_KBR: Tensor) -> Tensor:
        total = self.new_zeros(len(weights_KBR), *self.shape)
        for weights_BR, component in zip(weights_KBR.to(total), total, strict=True):
            deltas_BTi = torch.einsum("br,btri->bti", weights_BR, self.deltas_BTRi)
            component.index_add_(0, self.indices_BT.flatten(), deltas_BTi.flatten(0, 1))
        return total

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

    def weighted_sum(self, weights_KBR: Tensor) -> Tensor:
        total = self.parts[0].weighted_sum(weights_KBR)
        for part in self.parts[1:]:
            total = total + part.weighted_sum(weights_KBR)
        return total

    def examples(self, which: slice | Tensor) -> Self:
        return type(self)(tuple(part.examples(which) for part in self.parts))


def add(contributions: Sequence[Contribution]) -> Contribution:
    """The sum of a parameter's uses, in one form where they share it: uses of a layer are more positions of one use."""
    outers = [part for part in contributions if isinstance(part, Outer)]
    rows = [part for part in contributions if isinstance(part, Rows)]
    denses = [part for part in contributions if isinstance(part, Dense)]
    parts: list[Contribution] = [part for part in contributions if isinstance(part, Sum)]
    for kind in dict.fromkeys((part.inputs_first, part.deltas_BGTRo.shape[1]) for part in outers):
        same = [part for part in outers if (part.inputs_first, part.deltas_BGTRo.shape[1]) == kind]
        deltas = torch.cat([part.deltas_BGTRo for part in same], dim=2)
        inputs = torch.cat([part.inputs_BGTi for part in same], dim=2)
        parts.append(Outer(deltas, inputs, same[0].shape, same[0].inputs_first))
    if rows:
        deltas = torch.cat([part.deltas_BTRi for part in rows], dim=1)
        parts.append(Rows(deltas, torch.cat([part.indices_BT for part in rows], dim=1), rows[0].shape))
    if denses:
        total = denses[0].rows
        for part in denses[1:]:
            total = total + part.rows
        parts.append(Dense(total))
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))
