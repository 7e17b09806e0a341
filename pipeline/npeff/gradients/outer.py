"""Rows that are sums of outer products, as those of linear layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from npeff.gradients.contribution import MEMORY_ELEMENTS, blocks, cached_elements, dense_gram

_PART_ELEMENTS = 1 << 18
"""Numbers of rows formed at a time for a part of a parameter on a CPU: more, and each leaves the cache before it is
used; fewer, and the products become narrow."""


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
        grams_BRR += dense_gram(part)
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
