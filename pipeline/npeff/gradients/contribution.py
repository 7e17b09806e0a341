"""The contribution of one parameter to the Fisher factors of a batch, stored in its cheapest form.

A row of a Fisher factor is a gradient. For a layer that multiplies its inputs by a weight, the weight's part of the row
is Σ_t δ_t ⊗ a_t. Here a_t is the layer's input at position t and δ_t is the gradient at its output. Inner products
(`gram`) and sketches do not need the formed rows. Every form has the same interface:

    dense()             form the rows: (B, R, *shape)
    gram()              inner products of the rows of each example: (B, R, R), float64
    add_weighted_sum    add Σ_{b,r} w[k,b,r] row[b,r] to a tensor (K, *shape)
    examples(which)     the contribution of a part of the batch, given by a slice or a mask

Legend: B batch, R rank, T positions, G groups of a convolution, o outputs and i inputs of a group, V rows of an
embedding, K components.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

# Target number of elements of temporary tensors, reached by working on blocks of examples: MEMORY_ELEMENTS bounds the
# use of memory, CACHE_ELEMENTS keeps a temporary within the cache of a core.
MEMORY_ELEMENTS, CACHE_ELEMENTS = 1 << 25, 1 << 19


class Contribution(Protocol):
    """One parameter's part of the rows of the Fisher factors of a batch."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""

    @property
    def n_examples(self) -> int:
        """B, the number of examples."""

    @property
    def rank(self) -> int:
        """R, the number of rows per example."""

    def new_zeros(self, *shape: int) -> Tensor:
        """Return zeros with the dtype and device of the rows."""

    def dense(self) -> Tensor: ...

    def gram(self) -> Tensor: ...

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        """Add Σ_{b,r} w[k,b,r] row[b,r] to `total` (K, *shape) in place. `total` must be contiguous."""

    def examples(self, which: slice | Tensor) -> Self: ...


AnyContribution = TypeVar("AnyContribution", bound=Contribution)


def cached_elements(device: torch.device) -> int:
    """Return the block size, in elements, for work that reads each element once.

    On a CPU a block fits in the cache. An accelerator needs large blocks.
    """
    return CACHE_ELEMENTS if device.type == "cpu" else MEMORY_ELEMENTS


def blocks(
    contribution: AnyContribution, elements_per_example: int, elements: int
) -> Iterator[tuple[int, int, AnyContribution]]:
    """Yield consecutive ranges of examples (start, stop, part) whose temporaries have about `elements` elements."""
    size = max(1, elements // max(1, elements_per_example))
    for start in range(0, contribution.n_examples, size):
        stop = min(start + size, contribution.n_examples)
        yield start, stop, contribution.examples(slice(start, stop))


def flat_blocks(contribution: Contribution, elements: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, rows) for blocks of examples, with rows (b, R, number of entries of the parameter)."""
    n_entries, rank = math.prod(contribution.shape), contribution.rank
    elements = cached_elements(contribution.new_zeros(0).device) if elements is None else elements
    for start, stop, part in blocks(contribution, rank * n_entries, elements):
        yield start, stop, part.dense().reshape(stop - start, rank, n_entries)


def dense_gram(contribution: Contribution) -> Tensor:
    return torch.cat([(rows @ rows.transpose(1, 2)).double() for _, _, rows in flat_blocks(contribution)])


def _add_dense_weighted_sum(contribution: Contribution, weights_KBR: Tensor, total: Tensor) -> None:
    weights_KBR = weights_KBR.to(total)
    for start, stop, rows in flat_blocks(contribution, MEMORY_ELEMENTS):
        total.view(len(total), -1).addmm_(weights_KBR[:, start:stop].flatten(1), rows.flatten(0, 1).to(total))


@dataclass(frozen=True)
class Dense:
    """Formed rows: for biases, weights of norms, and all parameters without a cheaper form."""

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
        return dense_gram(self)

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        _add_dense_weighted_sum(self, weights_KBR, total)

    def examples(self, which: slice | Tensor) -> Self:
        return type(self)(self.rows[which])
