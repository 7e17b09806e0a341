"""Rows of stacks of matrices of which each token uses some, such as the weights of the experts of a mixture.

Legend: B batch, R rank, E experts, n pairs of a token and an expert, e examples of an expert, o outputs and i inputs of
an expert, K components.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from npeff.gradients.contribution import cached_elements
from npeff.gradients.outer import Outer, forming_is_cheaper


@dataclass(frozen=True)
class Routed:
    """Rows Σ_n e_{expert_n} ⊗ δ_n ⊗ a_n. The parameter is (E, o, i), or (E, i, o) with `inputs_first`.

    The pairs are sorted by expert, and by example within an expert. Computations use only the experts of an example.
    """

    deltas: tuple[Tensor, ...]
    """R tensors (n, o)."""
    inputs_ni: Tensor
    experts_n: Tensor
    examples_n: Tensor
    n_examples: int
    shape: tuple[int, ...]
    inputs_first: bool = False

    @classmethod
    def joined(cls, parts: Sequence[Self], firsts: Sequence[int], n_examples: int) -> Self:
        """Join rows of one parameter.

        Args:
            parts: The rows.
            firsts: For each part, the number of its first example among all examples.
            n_examples: B, the number of all examples.
        """
        inputs_ni = torch.cat([part.inputs_ni for part in parts])
        experts_n = torch.cat([part.experts_n for part in parts])
        examples_n = torch.cat([part.examples_n + first for part, first in zip(parts, firsts, strict=True)])
        order_n = (experts_n * n_examples + examples_n).argsort()
        deltas = tuple(torch.cat(row)[order_n] for row in zip(*(part.deltas for part in parts), strict=True))
        found = inputs_ni[order_n], experts_n[order_n], examples_n[order_n]
        return cls(deltas, *found, n_examples, parts[0].shape, parts[0].inputs_first)

    @property
    def rank(self) -> int:
        return len(self.deltas)

    def new_zeros(self, *shape: int) -> Tensor:
        return self.inputs_ni.new_zeros(shape)

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Yield each expert in use and the range of its pairs."""
        experts, counts = self.experts_n.unique_consecutive(return_counts=True)
        start = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            yield expert, slice(start, start + count)
            start += count

    def by_expert(self) -> Iterator[tuple[int, Tensor, Outer]]:
        """Yield each expert in use, its examples (e,), and the rows of its matrix in these examples."""
        for expert, examples_e, inputs_eTi, deltas_eRTo in self._padded():
            yield expert, examples_e, self._outer(inputs_eTi, deltas_eRTo)

    def _outer(self, inputs_eTi: Tensor, deltas_eRTo: Tensor) -> Outer:
        deltas = tuple(deltas_eTo[:, None] for deltas_eTo in deltas_eRTo.unbind(1))
        return Outer(deltas, inputs_eTi[:, None], self.shape[1:], self.inputs_first)

    def _padded(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Yield each expert in use, its examples, and inputs (e, T, i) and deltas (e, R, T, o), padded with zeros."""
        R = self.rank
        for expert, span in self.spans():
            examples_e, counts_e = self.examples_n[span].unique_consecutive(return_counts=True)
            e, T = len(counts_e), int(counts_e.max())
            places_n = torch.arange(e, device=counts_e.device).repeat_interleave(counts_e)
            firsts_e = counts_e.cumsum(0) - counts_e
            positions_n = torch.arange(len(places_n), device=counts_e.device) - firsts_e[places_n]
            inputs_ni, deltas_no = self.inputs_ni[span], [deltas_no[span] for deltas_no in self.deltas]
            padded_ni = self.new_zeros(e * T, inputs_ni.shape[1])
            padded_ni.index_copy_(0, places_n * T + positions_n, inputs_ni)
            padded_no = self.new_zeros(e * R * T, deltas_no[0].shape[1])
            for row in range(R):
                padded_no.index_copy_(0, (places_n * R + row) * T + positions_n, deltas_no[row])
            yield expert, examples_e, padded_ni.view(e, T, -1), padded_no.view(e, R, T, -1)

    def dense(self) -> Tensor:
        rows = self.new_zeros(self.n_examples, self.rank, *self.shape)
        for expert, examples_e, outer in self.by_expert():
            rows[examples_e, :, expert] = outer.dense()
        return rows

    def gram(self) -> Tensor:
        """Compute the Gram matrices (B, R, R), float64, by Σ_{n,m} (a_n·a_m)(δ_n·δ_m) over the pairs of an expert.

        Unlike in `outer_gram`, positions are few and outputs are many, so that one product takes the inner products of
        all rows.
        """
        grams = torch.zeros(self.n_examples, self.rank, self.rank, dtype=torch.float64, device=self.inputs_ni.device)
        for _, examples_e, inputs_eTi, deltas_eRTo in self._padded():
            if forming_is_cheaper(outer := self._outer(inputs_eTi, deltas_eRTo)):
                grams.index_add_(0, examples_e, outer.gram())
                continue
            step = max(1, cached_elements(grams.device) // deltas_eRTo[0].numel())
            parts = zip(examples_e.split(step), inputs_eTi.split(step), deltas_eRTo.split(step), strict=True)
            for examples, inputs, deltas in parts:
                mixed = (inputs @ inputs.mT)[:, None] @ deltas
                grams.index_add_(0, examples, (mixed.flatten(2) @ deltas.flatten(2).mT).double())
        return grams

    def add_weighted_sum(self, weights_KBR: Tensor, total: Tensor) -> None:
        for expert, examples_e, outer in self.by_expert():
            outer.add_weighted_sum(weights_KBR[:, examples_e], total[:, expert])

    def examples(self, which: slice | Tensor) -> Self:
        kept = torch.arange(self.n_examples, device=self.examples_n.device)[which]
        places_B = torch.full((self.n_examples,), -1, device=kept.device)
        places_B[kept] = torch.arange(len(kept), device=kept.device)
        places_n = places_B[self.examples_n]
        used_n = places_n >= 0
        deltas = tuple(deltas_no[used_n] for deltas_no in self.deltas)
        found = self.inputs_ni[used_n], self.experts_n[used_n], places_n[used_n]
        return type(self)(deltas, *found, len(kept), self.shape, self.inputs_first)
