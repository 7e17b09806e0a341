"""Conjugate gradients on the digits: iterations without and with the sketch as preconditioner."""

from __future__ import annotations

from typing import Any

import torch
from npeff.directions import cosine
from npeff.training import ExactPreconditioner, LowRankPreconditioner
from npeff.training.conjugate_gradients import CGState
from npeff.training.low_rank import leading_eigenpairs, sketched_eigenvectors
from torch import Tensor
from training_loops.digits import convolutional, parts, train

from natural_gradients.rows import DenseRows, dense_rows, loss_gradient, sketched_rows

N, EPOCHS = 150, (0, 4)
DIMS = (1024, 4096)
DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
RESIDUAL, ERROR = 1e-3, 1e-2
"""Relative residual, and estimated relative error of the direction, at which the iterations are counted."""
RANKS = (16, 64)


def measured() -> list[dict[str, Any]]:
    """Return one row for each model (untrained, and trained for some epochs) and damping.

    The rows have the numbers of iterations, the errors of the directions at their end, and the cosines of other
    directions with the exact one: the sketch in place of the rows, few directions, the diagonal, the gradient.
    """
    found = []
    training, validation, _ = parts()
    part = validation.some(torch.arange(N))
    for epochs in EPOCHS:
        model = convolutional(0)
        train(model, training, torch.optim.Adam(model.parameters(), lr=2e-3), epochs, 0)
        model = model.double()
        rows, gradient = dense_rows(model, part), loss_gradient(model, part)
        sketches = {dim: sketched_rows(model, part, dim) for dim in DIMS}
        gram_nn = rows.rows_nP @ rows.rows_nP.T
        largest = float(torch.linalg.eigvalsh(gram_nn)[-1])
        low_rank = {rank: _leading(rows, sketches[4096], rank) for rank in RANKS}
        for damping in DAMPINGS:
            exact = rows.solved(damping, rows.flat(gradient))
            row: dict[str, Any] = {"epochs": epochs, "damping": damping, "largest": largest}
            for name, sketch in {"plain": None, **sketches}.items():
                states: list[CGState] = []
                kind = ExactPreconditioner(
                    rows, damping=damping, sketched_rows=sketch, tolerance=1e-5, max_iterations=1000
                )
                kind.solve(gradient, after=states.append)
                squared_norm = float(rows.flat(gradient).square().sum())
                small = [state.relative_residual <= RESIDUAL for state in states]
                ends = [state.relative_error(damping, squared_norm) <= ERROR for state in states]
                for what, found_n in {"residual": small, "error": ends}.items():
                    state = states[found_n.index(True)]
                    direction = (rows.flat(gradient) - state.solution_n @ rows.rows_nP) / damping
                    error = float((direction - exact).norm() / exact.norm())
                    row[f"{name}, {what}"] = {"iterations": state.iteration, "error": error}
            g, others = rows.flat(gradient), {}
            for dim, sketch in sketches.items():
                sketched_nn = sketch.double() @ sketch.double().T
                sketched_nn.diagonal().add_(damping)
                others[f"sketch alone, {dim}"] = g - torch.linalg.solve(sketched_nn, rows.rows_nP @ g) @ rows.rows_nP
            for rank, pairs in low_rank.items():
                made = LowRankPreconditioner(*pairs, damping=damping)
                others[f"low_rank, {rank}"] = rows.flat(made.precondition(gradient))
            others |= {"diagonal": g / (rows.rows_nP.square().sum(0) + damping), "gradient": g}
            row["cosines"] = {name: cosine(direction, exact) for name, direction in others.items()}
            found.append(row)
    return found


def _leading(rows: DenseRows, sketch: Tensor, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    vectors_kn = sketched_eigenvectors(lambda: (sketch,), rank)
    return leading_eigenpairs(vectors_kn, rows.block_weighted_sums, rows.block_products)
