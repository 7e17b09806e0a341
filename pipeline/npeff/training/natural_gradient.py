"""Natural gradients (F̄ + λI)⁻¹ g with the mean Fisher F̄ of a data set and the damping λ (Amari 1998).

F̄ = BᵀB, where B are the gradient rows A_i of all N examples, divided by √N. Three kinds replace F̄ by a matrix that is
easy to invert: its diagonal, a Kronecker product for each layer (`npeff.training.kfac`), and its part in the span of a
few directions. The kind `exact` solves the system with F̄ itself, by the identity

    (F̄ + λI)⁻¹ g = (g − Bᵀy)/λ    with    (λI + BBᵀ) y = B g

and conjugate gradients for y. An iteration takes a product with Bᵀ and one with B, which never form B. Sketched rows B̂
make a good preconditioner (λI + B̂B̂ᵀ)⁻¹: the iterations become few, and the result is still that of F̄.

Legend: n rows of B, P parameters, k directions, D sketch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from npeff.training import conjugate_gradients
from npeff.training.checks import check_gradients, checked_damping, is_count, is_number
from npeff.training.conjugate_gradients import CGState, SketchPreconditioner
from npeff.training.diagonals import Tensors, check_diagonal, named_tensors
from npeff.training.errors import TrainingError
from npeff.training.ewc import refuse_empirical
from npeff.training.smaller_gram import Blocks

Direction = dict[str, Tensor]
"""A tensor for each parameter, by name."""


class Preconditioner(Protocol):
    """A natural gradient: the inverse of a damped Fisher."""

    def precondition(self, gradients: Mapping[str, Tensor]) -> Direction:
        """Compute (F̄ + λI)⁻¹ g.

        Args:
            gradients: The gradient g of a loss, a tensor for every parameter of the Fisher.

        Returns:
            The natural gradient by parameter name, with the dtypes and devices of the gradients. A step subtracts it.

        Raises:
            TrainingError: The gradients are not those of the parameters of the Fisher.
        """
        ...


class FisherRows(Protocol):
    """The products with the rows B of a data set, B = A/√N."""

    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the parameters."""

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        """Return B v (n,), float64, for a vector v with a tensor for each parameter."""
        ...

    def weighted_sum(self, weights_n: Tensor) -> Direction:
        """Return Bᵀ w for weights (n,), float64."""
        ...


class DiagonalPreconditioner:
    """The natural gradient with the diagonal f of the Fisher: g / (f + λ).

    Args:
        fisher: The diagonal by parameter name, or a safetensors file, such as ``diagonal_fisher.safetensors`` of a run.
        damping: λ.
        allow_empirical: Accept a file of a Fisher that was computed with the labels of the data (``empirical``).

    Raises:
        TrainingError: The damping is not a finite number above 0, or the tensors cannot be a diagonal Fisher.
    """

    def __init__(self, fisher: Tensors, *, damping: float, allow_empirical: bool = False) -> None:
        self._damping = checked_damping(damping)
        found = named_tensors(fisher, "fisher")
        refuse_empirical(found.metadata.get("labels"), "fisher", allow_empirical)
        check_diagonal(found.values, "fisher")
        self._fisher = found.values
        self._shapes = {name: tuple(values.shape) for name, values in found.values.items()}

    def precondition(self, gradients: Mapping[str, Tensor]) -> Direction:
        """See `Preconditioner.precondition`."""
        check_gradients(gradients, self._shapes)
        found = {}
        for name, g in gradients.items():
            f = self._fisher[name].to(g.device, _wider(self._fisher[name], g))
            found[name] = (g.to(f) / (f + self._damping)).to(g.dtype)
        return found


class LowRankPreconditioner:
    """The natural gradient with the part of the Fisher in the span of k directions: F̄ = Σ_k μ_k v_k v_kᵀ.

    Args:
        eigenvalues_k: The eigenvalues μ (k,), not negative.
        directions: The orthonormal eigenvectors v: tensors (k, *shape) by parameter name, or a safetensors file.
        damping: λ.

    Raises:
        TrainingError: The damping is not a finite number above 0, or the eigenvalues and directions do not fit.
    """

    def __init__(self, eigenvalues_k: Tensor, directions: Tensors, *, damping: float) -> None:
        self._damping = checked_damping(damping)
        self._directions = named_tensors(directions, "directions").values
        self._eigenvalues_k = eigenvalues_k.double().cpu()
        _check_eigenpairs(self._eigenvalues_k, self._directions)
        self._shapes = {name: tuple(values.shape[1:]) for name, values in self._directions.items()}

    def precondition(self, gradients: Mapping[str, Tensor]) -> Direction:
        """See `Preconditioner.precondition`."""
        check_gradients(gradients, self._shapes)
        products_k = torch.zeros_like(self._eigenvalues_k)
        for name, rows in self._directions.items():
            dtype = _wider(rows, gradients[name])
            products_k += (_matrix(rows).to(dtype) @ gradients[name].to(rows.device, dtype).flatten()).double().cpu()
        # (F̄ + λI)⁻¹ = (I − V diag(μ/(μ + λ)) Vᵀ)/λ
        weights_k = products_k * self._eigenvalues_k / (self._eigenvalues_k + self._damping)
        found = {}
        for name, g in gradients.items():
            rows, dtype = self._directions[name], _wider(self._directions[name], g)
            part = (weights_k.to(rows.device, dtype) @ _matrix(rows).to(dtype)).reshape(g.shape)
            found[name] = ((g.to(dtype) - part.to(g.device)) / self._damping).to(g.dtype)
        return found


@dataclass(frozen=True)
class Solution:
    """A natural gradient of conjugate gradients."""

    direction: Direction
    iterations: int
    relative_error: float
    """Estimate of the relative error of the direction."""
    converged: bool


class ExactPreconditioner:
    """The natural gradient with the Fisher itself, by conjugate gradients.

    Args:
        rows: The products with the rows of the Fisher.
        damping: λ.
        sketched_rows: The sketched rows (n, D), or a function that returns them in blocks. They precondition the
            iterations. None for plain conjugate gradients.
        tolerance: Estimated relative error of the natural gradient at which the iterations end.
        max_iterations: Largest number of iterations. Each takes a product with Bᵀ and one with B.

    Raises:
        TrainingError: An option is out of bounds, or there is not one sketched row for each row.
    """

    def __init__(
        self,
        rows: FisherRows,
        *,
        damping: float,
        sketched_rows: Tensor | Blocks | None = None,
        tolerance: float = 0.01,
        max_iterations: int = 100,
    ) -> None:
        self._rows, self.damping = rows, checked_damping(damping)
        if not is_number(tolerance) or not 0 < tolerance < 1:
            raise TrainingError(f"tolerance must be a number between 0 and 1, not {tolerance!r}")
        if not is_count(max_iterations):
            raise TrainingError(f"max_iterations must be a number of iterations, at least 1, not {max_iterations!r}")
        self.tolerance, self.max_iterations = float(tolerance), max_iterations
        self._inverse: conjugate_gradients.Apply = lambda vector_n: vector_n
        if sketched_rows is not None:
            blocks = (lambda: (sketched_rows,)) if isinstance(sketched_rows, Tensor) else sketched_rows
            self._inverse = SketchPreconditioner(blocks, self.damping)

    def precondition(self, gradients: Mapping[str, Tensor]) -> Direction:
        """See `Preconditioner.precondition`.

        Raises:
            TrainingError: Also if the iterations do not reach the tolerance.
        """
        found = self.solve(gradients)
        if not found.converged:
            raise TrainingError(
                f"conjugate gradients do not converge in {found.iterations} iterations (estimated relative "
                f"error {found.relative_error:.1e})",
                "raise max_iterations, tolerance or damping",
            )
        return found.direction

    def solve(
        self,
        gradients: Mapping[str, Tensor],
        state: CGState | None = None,
        after: Callable[[CGState], object] = lambda state: None,
    ) -> Solution:
        """Compute the natural gradient, whether or not the iterations reach the tolerance.

        Args:
            gradients: See `Preconditioner.precondition`.
            state: The state of an interrupted solution with the same gradients, from which the iterations go on.
            after: Called with the state before the first iteration and after each one.

        Returns:
            The natural gradient, and how the iterations ended.

        Raises:
            TrainingError: The gradients do not fit, or rounding errors are larger than the damping.
        """
        check_gradients(gradients, self._rows.shapes)
        if state is None:
            state = conjugate_gradients.start(self._rows.products(gradients), self._inverse)
            after(state)
        squared_norm = sum(float(g.double().square().sum()) for g in gradients.values())
        while (
            state.relative_error(self.damping, squared_norm) > self.tolerance and state.iteration < self.max_iterations
        ):
            state = conjugate_gradients.step(state, self._apply, self._inverse)
            after(state)
        sums = self._rows.weighted_sum(state.solution_n)
        direction = {}
        for name, g in gradients.items():
            dtype = _wider(sums[name], g)
            direction[name] = ((g.to(dtype) - sums[name].to(g.device, dtype)) / self.damping).to(g.dtype)
        error = state.relative_error(self.damping, squared_norm)
        return Solution(direction, state.iteration, error, error <= self.tolerance)

    def _apply(self, vector_n: Tensor) -> Tensor:
        return self.damping * vector_n + self._rows.products(self._rows.weighted_sum(vector_n))


def _wider(first: Tensor, second: Tensor) -> torch.dtype:
    """Return the wider dtype of two tensors, at least float32."""
    return torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)


def _matrix(rows: Tensor) -> Tensor:
    """Return tensors (k, *shape) as a matrix with k rows."""
    return rows.reshape(len(rows), -1)


def _check_eigenpairs(eigenvalues_k: Tensor, directions: Mapping[str, Tensor]) -> None:
    if (
        eigenvalues_k.dim() != 1
        or not len(eigenvalues_k)
        or not bool((torch.isfinite(eigenvalues_k) & (eigenvalues_k >= 0)).all())
    ):
        raise TrainingError("the eigenvalues must be one or more finite numbers that are not negative")
    if not directions:
        raise TrainingError("directions is empty: give one tensor for each parameter")
    gram_kk = torch.zeros(len(eigenvalues_k), len(eigenvalues_k), dtype=torch.float64)
    for name, rows in directions.items():
        if rows.dim() == 0 or len(rows) != len(eigenvalues_k):
            raise TrainingError(
                f"directions: {name!r} has the shape {tuple(rows.shape)}: its first axis must have the "
                f"{len(eigenvalues_k)} directions of the eigenvalues"
            )
        flat = _matrix(rows)
        gram_kk += (flat @ flat.T).double().cpu()
    if not bool((gram_kk - torch.eye(len(gram_kk), dtype=torch.float64)).abs().max() < _ORTHONORMAL):
        raise TrainingError("the directions are not orthonormal: give unit eigenvectors")


_ORTHONORMAL = 1e-3
"""Largest error of an inner product of two directions, which may be stored in half precision."""
