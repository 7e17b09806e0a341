"""Gradient rows of the weight of an embedding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows Σ_t e_{index_t} ⊗ δ_t of an embedding. Computations use only the rows of the table that were looked up."""

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
        """Return the position of each look-up in the concatenation of one table per example."""
        tables_B = torch.arange(self.n_examples, device=self.indices_BT.device) * self.shape[0]
        return (self.indices_BT + tables_B[:, None]).flatten()

    def dense(self) -> Tensor:
        B, _, R, i = self.deltas_BTRi.shape
        rows = self.new_zeros(B * self.shape[0], R, i)
        rows.index_add_(0, self._slots(), self.deltas_BTRi.flatten(0, 1))
        return rows.view(B, -1, R, i).transpose(1, 2)

    def gram(self) -> Tensor:
        """Compute the Gram matrices (B, R, R), float64.

        Look-ups of the same table row by the same example are summed first. The sums then have disjoint supports.
        """
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
