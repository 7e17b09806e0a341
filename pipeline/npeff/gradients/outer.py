"""Rows that are sums of outer products, such as the rows of linear layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from npeff.gradients.contribution import MEMORY_ELEMENTS, blocks, cached_elements, dense_gram

_PART_ELEMENTS = 1 << 18
"""Number of elements of the rows formed at a time for a part of a parameter on a CPU. Larger parts leave the cache
before use; smaller parts make the matrix products narrow."""


@dataclass(frozen=True)
class Outer:
    """Rows Σ_t δ_t ⊗ a_t for each group. The parameter, reshaped to a matrix, is (G o) × i.

    With `inputs_first` (G = 1) the parameter is stored as inputs × outputs, and the rows are Σ_t a_t ⊗ δ_t.
    """

    deltas: tuple[Tensor, ...]
    """R tensors (B, G, T, o) from autograd. They are large, so they are not copied into one tensor."""
    inputs_BGTi: Tensor
    shape: tuple[int, ...]
    inputs_first: bool = False
    known_live_BGT: Tensor | None = None
    """The result of `live_BGT`, if it is already known."""

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
        result: Tensor = rows_BRx.unflatten(2, self.shape)
        return result

    def gram(self) -> Tensor:
        """Compute Σ_{t,u} (δ_t·δ_u)(a_t·a_u), or the inner products of the formed rows if that is less work."""
        return outer_gram([self])

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        """Add Σ_{b,r} w[k,b,r] row[b,r] to `total` in place, by the cheaper of two methods.

        The first method multiplies the deltas by the weights and then takes one product over examples and positions.
        The second method forms rows for one part of the parameter at a time, such that the part fits in the cache.
        """
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
        part_elements = _PART_ELEMENTS if total_Kx.device.type == "cpu" else MEMORY_ELEMENTS
        for group in range(G):
            deltas_BRTo = torch.stack([deltas_BGTo[:, group] for deltas_BGTo in self.deltas], dim=1).to(total_Kx)
            inputs_BTi = self.inputs_BGTi[:, group].to(total_Kx)
            # the left factor is split into parts; its memory layout makes each part contiguous along positions
            left = (inputs_BTi[:, None] if self.inputs_first else deltas_BRTo).mT.contiguous()
            n_left, n_right = left.shape[2], (deltas_BRTo if self.inputs_first else inputs_BTi).shape[-1]
            for start in range(0, n_left, step := max(1, part_elements // (B * R * n_right))):
                part = left[:, :, start : start + step]
                rows = part @ deltas_BRTo if self.inputs_first else part.reshape(B, -1, T) @ inputs_BTi
                first = (group * n_left + start) * n_right
                rows_nx = rows.reshape(B * R, -1)
                total_Kx[:, first : first + rows_nx.shape[1]].addmm_(weights_Kn, rows_nx)

    def examples(self, which: slice | Tensor) -> Self:
        deltas = tuple(deltas_BGTo[which] for deltas_BGTo in self.deltas)
        return type(self)(deltas, self.inputs_BGTi[which], self.shape, self.inputs_first)

    def live_BGT(self) -> Tensor:
        """Return a mask of the positions at which at least one delta of an example is not zero."""
        return live_positions(self.deltas) if self.known_live_BGT is None else self.known_live_BGT

    def inputs_key(self) -> Hashable:
        """Return a key that is equal for layers with the same input tensor, such as query, key and value layers."""
        inputs = self.inputs_BGTi
        return inputs.data_ptr(), inputs.shape, inputs.stride(), inputs.dtype


def forming_is_cheaper(outer: Outer) -> bool:
    """Return whether Gram matrices are computed from formed rows with less work."""
    T, o = outer.deltas[0].shape[2:]
    R, i = outer.rank, outer.inputs_BGTi.shape[-1]
    return T * (T * (i + R * o) + R * R * o) >= R * o * i * (T + R)


_FIRST_FEATURES = 16
"""Number of features tested first for live positions. The other features are tested only where these are zero."""


def live_positions(deltas: Sequence[Tensor]) -> Tensor:
    """Return a mask (…) of the positions where at least one of R tensors (…, o) is not zero."""
    live = _any_nonzero([delta[..., :_FIRST_FEATURES] for delta in deltas])
    if deltas[0].shape[-1] > _FIRST_FEATURES and not live.all():
        rest = ~live
        live[rest] = _any_nonzero([delta[rest] for delta in deltas])
    return live


def _any_nonzero(deltas: Sequence[Tensor]) -> Tensor:
    live = deltas[0].abs().amax(-1).ne(0)
    for delta in deltas[1:]:
        live |= delta.abs().amax(-1).ne(0)
    return live


def outer_gram(outers: Sequence[Outer]) -> Tensor:
    """Compute the sum of the Gram matrices (B, R, R), float64, of layers with the same inputs a_t.

    A Gram matrix is Σ_{t,u} (a_t·a_u)(δ_t·δ_u), and all layers share the inner products of the inputs. Where it is less
    work, the Gram matrix is computed from the formed rows.
    """
    first = outers[0]
    B, G, T = first.inputs_BGTi.shape[:3]
    R = first.rank
    formed = [part for part in outers if forming_is_cheaper(part)]
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
"""Number of positions per strip. One matrix product takes the inner products of a strip with all earlier positions."""


def _squared_norms(outers: Sequence[Outer]) -> Tensor:
    """Compute `outer_gram` for R = 1: Σ_{t,u} (a_t·a_u)(δ_t·δ_u), (B,), float64.

    The sum is symmetric in t and u, so the terms t < u are computed once and counted twice.
    """
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
