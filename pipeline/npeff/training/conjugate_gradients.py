"""Preconditioned conjugate gradients on (λI + BBᵀ) y = b, with explicit state, and a sketch as the preconditioner.

Legend: n rows, D sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from npeff.training.errors import TrainingError
from npeff.training.smaller_gram import Blocks, smaller_gram

Apply = Callable[[Tensor], Tensor]
"""A linear map of vectors (n,), float64."""


_ROUNDING = 1e-12
"""A relative residual, and a relative squared norm, of rounding errors."""
_SLOWEST = 0.95
"""Largest ratio of the geometric series of decreases."""


@dataclass(frozen=True)
class CGState:
    """The state after some iterations. All tensors are float64."""

    iteration: int
    solution_n: Tensor
    residual_n: Tensor
    """b − (λI + BBᵀ) y, from the recurrence."""
    search_n: Tensor
    """The next search direction."""
    right_n: Tensor
    """b."""
    slope: float
    """rᵀ M⁻¹ r with the residual r and the preconditioner M."""
    decreases: tuple[float, ...] = ()
    """The decrease of the squared error ‖y − y*‖², in the norm of λI + BBᵀ, in each iteration."""

    @property
    def relative_residual(self) -> float:
        """‖r‖/‖b‖; 0 for b = 0."""
        norm = float(self.right_n.norm())
        return float(self.residual_n.norm()) / norm if norm > 0 else 0.0

    def relative_error(self, damping: float, squared_norm: float) -> float:
        """Estimate the relative error of the natural gradient u = (g − Bᵀy)/λ.

        The error ‖Bᵀ(y − y*)‖/λ is at most that of y in the norm of λI + BBᵀ, divided by λ. The square of the latter is
        the sum of all further decreases. The decreases of the last iterations are the known part of this sum for the
        state before them (Strakoš & Tichý, ETNA 13, 2002), and the rest is estimated as that of a geometric series. The
        residual says little: for a small λ, an error of y with a small residual can be as large as u.

        Args:
            damping: λ.
            squared_norm: ‖g‖².

        Returns:
            The estimate: infinite before the second iteration, and 0 if the residual is that of rounding.
        """
        if self.relative_residual <= _ROUNDING:
            return 0.0
        window = max(1, self.iteration // 4)
        if self.iteration < 2 * window:
            return math.inf
        last, before = sum(self.decreases[-window:]), sum(self.decreases[-2 * window : -window])
        squared_error = last / (1 - min(last / before, _SLOWEST))
        y_n = self.solution_n
        # λ²‖u‖² = ‖g‖² − 2 yᵀb + yᵀBBᵀy with BBᵀy = b − r − λy
        squared = squared_norm - float(y_n @ (self.right_n + self.residual_n + damping * y_n))
        return math.sqrt(squared_error / max(squared, _ROUNDING * squared_norm))


def start(b_n: Tensor, precondition: Apply) -> CGState:
    """Return the state before the first iteration, y = 0."""
    b_n = b_n.double()
    search_n = precondition(b_n)
    return CGState(0, torch.zeros_like(b_n), b_n, search_n, b_n, float(b_n @ search_n))


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
        state.right_n,
        slope,
        (*state.decreases, length * state.slope),
    )


class SketchPreconditioner:
    """The inverse of M = λI + B̂B̂ᵀ, with sketched rows B̂ in place of the rows B.

    It is a preconditioner only. (λI + B̂B̂ᵀ)⁻¹ is not a good approximation of (λI + BBᵀ)⁻¹ for small λ, because a sketch
    keeps inner products with an error that is large beside λ.

    Args:
        rows: Returns the sketched rows in order, in blocks (m, D), as often as it is called.
        damping: λ.
    """

    def __init__(self, rows: Blocks, damping: float) -> None:
        self._rows, self._damping = rows, damping
        # M itself is factorized, or λI + B̂ᵀB̂ if that is smaller
        matrix, self._by_rows, self._n = smaller_gram(rows)
        matrix.diagonal().add_(damping)
        self._factor, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed):
            raise TrainingError(
                "rounding errors of the sketched rows are larger than the damping: use a larger damping"
            )

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
