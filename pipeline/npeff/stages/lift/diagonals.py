"""Stage 3, first half, on a worker, for components of diagonal Fishers: they become directions in parameter space.

As `LiftWorker`, in one pass for each block of components; what is added up in it are diagonals, which are the
components in all parameters, and gradient rows, which have their signs.

Shapes: N examples, M of a component's top examples, R rank, D sketch, K components, k components of the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npeff.directions import (
    accumulate_diagonals,
    cosine,
    diagonal_weights,
    fisher_weighted,
    principal_direction,
    sign_weights,
    zero_directions,
)
from npeff.fisher import GroupLayout
from npeff.stages.factorize.stored_diagonals import DiagonalKind
from npeff.stages.lift.worker import LiftWorker
from npeff.store.component_store import open_factorization
from npeff.verification import top_examples

SIGN_EXAMPLES = 256
"""Of a component: those with the largest coefficients, whose common direction in the sketch gives the signs."""

SIGN_ROWS = 1024
"""Of these examples' factors at most: where the rank is high fewer examples give the signs."""


class DiagonalLiftWorker(LiftWorker):
    """Lifts blocks of components of diagonals, one call each."""

    def __init__(self, kind: DiagonalKind, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._kind = kind
        self._groups = GroupLayout.of(self._loaded.model, self._loaded.layout)
        columns_D = open_factorization(self._paths.factorization).read_columns()
        self._columns_D = None if columns_D is None else torch.from_numpy(columns_D)

    def _rows(self, block: Sequence[int], component: int) -> list[int]:
        """Its diagonal, its gradient, and the sum of all examples' diagonals."""
        position = block.index(component)
        return [position, len(block) + 1 + position, len(block)]

    def _direction(self, component: int, vectors: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
        diagonal, gradient, mean = vectors
        diagonal = {name: tensor.clamp_min(0) for name, tensor in diagonal.items()}
        return fisher_weighted(diagonal, gradient, mean), self._cosine(component, diagonal)

    def _sums(self, block: tuple[int, ...], shards: list[int]) -> dict[str, Tensor]:
        """The components' diagonals, the sum of all examples' diagonals, and the components' gradients."""
        sums = zero_directions(self._loaded.layout, 2 * len(block) + 1, self._loaded.device)
        diagonals = {name: rows[: len(block) + 1] for name, rows in sums.items()}
        gradients = {name: rows[len(block) + 1 :] for name, rows in sums.items()}
        directions_kD = torch.stack([self._principal_direction(component) for component in block])
        for shard in shards:
            start, stop = self._fishers.plan.bounds(shard)
            arrays, coefficients_NK = self._arrays(shard), self._coefficients_NK[start:stop]
            lengths_N = self._lengths(arrays) * self._fit_N[start:stop]
            of_components = diagonal_weights(coefficients_NK, self._gram_KK, block, lengths_N)
            of_sum = diagonal_weights(torch.ones(stop - start, 1), torch.ones(1, 1), [0], lengths_N)
            diagonal_weights_kN = torch.cat([of_components, of_sum])
            row_weights_kNR = sign_weights(
                arrays["factors"], coefficients_NK[:, list(block)], directions_kD, arrays["frobenius_norms"]
            )
            used = (start + (lengths_N > 0).nonzero()[:, 0]).tolist()
            for examples in self._batches(range(start, stop), used):
                batch, places = self._loaded.batch(examples), torch.tensor(examples) - start
                weights = diagonal_weights_kN[:, places], row_weights_kNR[:, places]
                targets = self._loaded.targets(batch, examples)
                accumulate_diagonals(self._collector, batch, *weights, diagonals, gradients, examples, targets)
        return sums

    def _lengths(self, arrays: dict[str, Tensor]) -> Tensor:
        """What the diagonals of a shard's examples were divided by before they were factorized; float64."""
        norms_N = arrays["diagonal_norms"]
        if self._kind == "diagonal_entries":
            return norms_N
        return norms_N * arrays["grouped_diagonal"].double().norm(dim=1)

    def _principal_direction(self, component: int) -> Tensor:
        """Of a component's top examples, in the sketch."""
        coefficients_N = self._coefficients_NK[:, component].numpy()
        count = min(SIGN_EXAMPLES, max(1, SIGN_ROWS // self._fishers.rank))
        top_M = top_examples(coefficients_N, np.ones(len(coefficients_N), dtype=bool), count)
        factors_MRD = self._fishers.read_rows(top_M, ("factors",))["factors"]
        return principal_direction(torch.from_numpy(factors_MRD), torch.from_numpy(coefficients_N[top_M]))

    def _cosine(self, component: int, direction: Mapping[str, Tensor]) -> float:
        """Of the component, and the diagonal in all parameters as it is factorized."""
        if self._columns_D is None:
            found_D = self._groups.sums(direction)
        else:
            flat_P = torch.cat([direction[name].flatten() for name in self._loaded.layout.names]).double().cpu()
            found_D = flat_P[self._columns_D]
        return cosine(found_D, self._components_KD[component])
