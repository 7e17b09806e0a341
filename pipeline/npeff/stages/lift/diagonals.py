"""Lift of components of diagonal Fishers, from sums of diagonals and of gradient rows.

The sums of diagonals are the components in all parameters. The sums of gradient rows determine the signs.

Shapes: N examples of a shard, M of a component's top examples, R rank, D columns (entries or groups), K components,
k components of the block.
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
    inner_product,
    sign_weights,
    signed_roots,
)
from npeff.fisher import GroupLayout
from npeff.gradients import GradientCollector
from npeff.options.kinds import DiagonalKind
from npeff.stages.lift.factors import Direction, Lifted, Solution, WeightsOf
from npeff.stages.principal import stored_principal_direction
from npeff.store.fisher_store import FisherStore

SIGN_EXAMPLES = 256
"""Number of top examples of a component whose principal direction in the sketch determines the signs."""

SIGN_ROWS = 1024
"""Largest number of factor rows of these examples. Fewer examples are used if the rank is high."""


class DiagonalAndRowWeights:
    """Weights (k + 1, N) of diagonals, for the components and for the total, and weights (k, N, R) of gradient rows."""

    def __init__(self, diagonal_weights_kN: Tensor, row_weights_kNR: Tensor, used_N: Tensor) -> None:
        self._diagonal_weights_kN, self._row_weights_kNR, self.used_N = diagonal_weights_kN, row_weights_kNR, used_N

    def add(
        self,
        collector: GradientCollector,
        batch: Any,
        places_B: Tensor,
        sums: Direction,
        examples: Sequence[int],
        targets: Tensor | None,
    ) -> None:
        n_diagonals = len(self._diagonal_weights_kN)
        diagonals = {name: rows[:n_diagonals] for name, rows in sums.items()}
        gradients = {name: rows[n_diagonals:] for name, rows in sums.items()}
        weights = self._diagonal_weights_kN[:, places_B], self._row_weights_kNR[:, places_B]
        accumulate_diagonals(collector, batch, *weights, diagonals, gradients, examples, targets)


class DiagonalLift:
    """The `LiftRule` of diagonal Fishers. Its sums are the components' diagonals, the diagonals of all examples, and
    the components' gradient rows.

    Args:
        kind: kind of the diagonals.
        solution: the factorization to lift.
        fishers: the Fisher store.
        groups: groups of the parameters.
        columns_D: position of each column in the flat parameter vector, for ``diagonal_entries``.
        whitened: whether a direction is divided by the diagonal of the mean Fisher.
    """

    def __init__(
        self,
        kind: DiagonalKind,
        solution: Solution,
        fishers: FisherStore,
        groups: GroupLayout,
        columns_D: Tensor | None,
        whitened: bool,
    ) -> None:
        self._whitened = whitened
        self._kind, self._solution, self._fishers = kind, solution, fishers
        self._groups, self._columns_D = groups, columns_D

    def n_rows(self, block: Sequence[int]) -> int:
        return 2 * len(block) + 1

    def weights_of(self, block: Sequence[int]) -> WeightsOf:
        solution = self._solution
        directions_kD = torch.stack([self._principal_direction(component) for component in block])

        def weights(examples: slice, arrays: Mapping[str, Tensor]) -> DiagonalAndRowWeights:
            coefficients_NK = solution.coefficients_NK[examples]
            lengths_N = self._lengths(arrays) * solution.fit_N[examples]
            of_components = diagonal_weights(coefficients_NK, solution.gram_KK, block, lengths_N)
            of_sum = diagonal_weights(torch.ones(len(lengths_N), 1), torch.ones(1, 1), [0], lengths_N)
            row_weights_kNR = sign_weights(
                arrays["factors"], coefficients_NK[:, list(block)], directions_kD, arrays["frobenius_norms"]
            )
            return DiagonalAndRowWeights(torch.cat([of_components, of_sum]), row_weights_kNR, lengths_N > 0)

        return weights

    def rows(self, block: Sequence[int], component: int) -> list[int]:
        """Return the rows of the component's diagonal, of its gradient, and of the sum of all examples' diagonals."""
        position = block.index(component)
        return [position, len(block) + 1 + position, len(block)]

    def direction(self, component: int, vectors: list[Direction]) -> Lifted:
        diagonal, gradient, mean = vectors
        own = signed_roots(diagonal, gradient)
        if not self._whitened:
            return Lifted(own, 1.0)
        whitened = fisher_weighted(diagonal, gradient, mean)
        product, lengths = inner_product(own, whitened), inner_product(own, own) * inner_product(whitened, whitened)
        return Lifted(whitened, product / lengths**0.5 if lengths > 0 else 0.0)

    def lift_cosine(self, component: int, vectors: list[Direction], sketch_D: Tensor) -> float:
        """Return the cosine of the component and the lifted diagonal, reduced to the factorized columns."""
        diagonal = {name: tensor.clamp_min(0) for name, tensor in vectors[0].items()}
        if self._columns_D is None:
            found_D = self._groups.sums(diagonal)
        else:
            flat_P = torch.cat([tensor.flatten() for tensor in diagonal.values()]).double().cpu()
            found_D = flat_P[self._columns_D]
        return cosine(found_D, self._solution.components_KD[component])

    def _lengths(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """Return the lengths (N,) by which the diagonals were divided before the factorization; float64."""
        norms_N = arrays["diagonal_norms"]
        if self._kind == "diagonal_entries":
            return norms_N
        result: Tensor = norms_N * arrays["grouped_diagonal"].double().norm(dim=1)
        return result

    def _principal_direction(self, component: int) -> Tensor:
        """Return the principal direction (D,) of a component's top examples in the sketch."""
        coefficients_N = self._solution.coefficients_NK[:, component].numpy()
        count = min(SIGN_EXAMPLES, max(1, SIGN_ROWS // self._fishers.rank))
        return stored_principal_direction(
            self._fishers, coefficients_N, np.ones(len(coefficients_N), dtype=bool), count
        )
