"""Preconditioned conjugate gradients on (λI + BBᵀ) y = b, with explicit state, and a sketch as the preconditioner.

Legend: n rows, D sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from npeff.fisher.second_moments import MomentSum
from npeff.training.errors import TrainingError

Apply = Callable[[Tensor], Tensor]
"""A linear map of vectors (n,), float64."""


@dataclass(frozen=True)
class CGState:
    """The state after some iterations. All tensors are float64."""

    iteration: int
    solution_n: Tensor
    residual_n: Tensor
    """b − (λI + BBᵀ) y, from the recurrence."""
    search_n: Tensor
    """The next search direction."""
    slope: float
    """rᵀ M⁻¹ r with the residual r and the preconditioner M."""
    norm: float
    """‖b‖."""

    @property
    def relative_residual(self) -> float:
        """‖r‖/‖b‖; 0 for b = 0."""
        return float(self.residual_n.norm()) / self.norm if self.norm > 0 else 0.0


def start(b_n: Tensor, precondition: Apply) -> CGState:
    """Return the state before the first iteration, y = 0."""
    b_n = b_n.double()
    search_n = precondition(b_n)
    return CGState(0, torch.zeros_like(b_n), b_n, search_n, float(b_n @ search_n), float(b_n.norm()))


def step(state: CGState, apply: Apply, precondition: Apply) -> CGState:
    """Return the state after one more iteration, which applies the matrix once.

    Source: Hestenes & Stiefel 1952; Golub & Van Loan, Matrix Computations, algorithm 11.5.1.

    Raises:
        TrainingError: The matrix or the preconditioner is not positive in this direction, because of rounding.
    """
    product_n = apply(state.search_n)
    curvature = float(state.search_n @ product_n)
    if not (curvature > 0 and state.slope > 0 and math.isfinite(curvature)):
        raise TrainingError(
            f"conjugate gradients stop in iteration {state.iteration + 1}: rounding errors are larger than the damping",
            "use a larger damping",
        )
    length = state.slope / curvature
    residual_n = state.residual_n - length * product_n
    preconditioned_n = precondition(residual_n)
    slope = float(residual_n @ preconditioned_n)
    return CGState(
        state.iteration + 1,
        state.solution_n + length * state.search_n,
        residual_n,
        preconditioned_n + slope / state.slope * state.search_n,
        slope,
        state.norm,
    )


class SketchPreconditioner:
    """The inverse of M = λI + B̂B̂ᵀ, with sketched rows B̂ in place of the rows B.

    It is a preconditioner only. (λI + B̂B̂ᵀ)⁻¹ is not a good approximation of (λI + BBᵀ)⁻¹ for small λ, because a sketch
    keeps inner products with an error that is large beside λ.

    Args:
        rows: Returns the sketched rows in order, in blocks (m, D), as often as it is called.
        damping: λ.
    """

    def __init__(self, rows: Callable[[], Iterable[Tensor]], damping: float) -> None:
        self._rows, self._damping = rows, damping
        n, dim = 0, 0
        for block_mD in rows():
            n, dim = n + len(block_mD), block_mD.shape[1]
        self._by_rows = n <= dim
        """Whether the matrix that is factorized is n × n: M itself. Otherwise it is λI + B̂ᵀB̂, D × D."""
        if self._by_rows:
            rows_nD = torch.cat([block_mD.double() for block_mD in rows()])
            matrix = rows_nD @ rows_nD.T
        else:
            moments = MomentSum(dim)
            for block_mD in rows():
                moments.add(block_mD.double())  # rounding errors must be small beside λ
            matrix = moments.matrix()
        matrix.diagonal().add_(damping)
        self._factor, self._n = torch.linalg.cholesky(matrix), n

    def __call__(self, vector_n: Tensor) -> Tensor:
        """Return M⁻¹ times a vector (n,), float64.

        Raises:
            TrainingError: The vector does not have one entry for each row.
        """
        if len(vector_n) != self._n:
            raise TrainingError(f"there are {self._n} sketched rows, and the Fisher has {len(vector_n)} rows")
        if self._by_rows:
            return self._solve(vector_n)
        sketch_D = torch.zeros(len(self._factor), dtype=torch.float64)
        for block_mD, part_m in self._with_parts(vector_n):
            sketch_D += block_mD.double().T @ part_m
        sketch_D = self._solve(sketch_D)
        products = [block_mD.double() @ sketch_D for block_mD in self._rows()]
        return (vector_n - torch.cat(products)) / self._damping

    def _solve(self, vector: Tensor) -> Tensor:
        return torch.cholesky_solve(vector[:, None], self._factor)[:, 0]

    def _with_parts(self, vector_n: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        first = 0
        for block_mD in self._rows():
            yield block_mD, vector_n[first : first + len(block_mD)]
            first += len(block_mD)
