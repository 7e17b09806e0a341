"""Sums over the uses of a parameter, Gram matrices over all parameters, and products with directions."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from npeff.gradients.contribution import MEMORY_ELEMENTS, Contribution, Dense, dense_gram, flat_blocks
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.outer import Outer, outer_gram
from npeff.gradients.routed import Routed


def direction_products(contribution: Contribution, directions_Kx: Tensor) -> Tensor:
    """Compute the inner products (B, R, K) of the rows with K directions (K, *shape)."""
    if isinstance(contribution, Sum):
        return torch.stack([direction_products(part, directions_Kx) for part in contribution.parts]).sum(0)
    if isinstance(contribution, Rows):
        looked_up_KBTi = directions_Kx[:, contribution.indices_BT]
        return torch.einsum("btri,kbti->brk", contribution.deltas_BTRi, looked_up_KBTi)
    if isinstance(contribution, Routed):
        products_BRK = contribution.new_zeros(contribution.n_examples, contribution.rank, len(directions_Kx))
        for expert, examples_e, outer in contribution.by_expert():
            products_BRK.index_add_(0, examples_e, direction_products(outer, directions_Kx[:, expert]))
        return products_BRK
    directions_xK = directions_Kx.flatten(1).T if directions_Kx.dim() > 1 else directions_Kx[None]
    # large blocks, because each block reads all directions
    return torch.cat([rows_bRx @ directions_xK for _, _, rows_bRx in flat_blocks(contribution, MEMORY_ELEMENTS)])


def with_same_inputs(contributions: Iterable[Contribution]) -> tuple[list[list[Outer]], list[Contribution]]:
    """Split `contributions` into outer products, grouped by their input tensors, and all other contributions."""
    outers: dict[Hashable, list[Outer]] = {}
    others: list[Contribution] = []
    for contribution in contributions:
        if isinstance(contribution, Outer):
            outers.setdefault(contribution.inputs_key(), []).append(contribution)
        else:
            others.append(contribution)
    return list(outers.values()), others


def total_gram(contributions: Iterable[Contribution]) -> Tensor:
    """Compute the Gram matrices A Aᵀ (B, R, R), float64, over all parameters."""
    groups, others = with_same_inputs(contributions)
    return torch.stack([*map(outer_gram, groups), *(part.gram() for part in others)]).sum(0)


@dataclass(frozen=True)
class Sum:
    """The contribution of a parameter whose uses have different forms, such as an embedding shared with the output
    layer."""

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
        return dense_gram(self)

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        for part in self.parts:
            part.add_weighted_sum(weights_KBR, total)

    def examples(self, which: slice | Tensor) -> Self:
        return type(self)(tuple(part.examples(which) for part in self.parts))


def add(contributions: Sequence[Contribution]) -> Contribution:
    """Add the contributions of all uses of a parameter.

    Uses of the same form are merged: further uses of a layer become additional positions of one use.
    """
    outers = [part for part in contributions if isinstance(part, Outer)]
    rows = [part for part in contributions if isinstance(part, Rows)]
    routed = [part for part in contributions if isinstance(part, Routed)]
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
    if routed:
        parts.append(routed[0] if len(routed) == 1 else Routed.joined(routed, [0] * len(routed), routed[0].n_examples))
    if denses:
        total = denses[0].rows
        for part in denses[1:]:
            total = total + part.rows
        parts.append(Dense(total))
    return parts[0] if len(parts) == 1 else Sum(tuple(parts))
