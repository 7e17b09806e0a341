"""The loss after one best step of an untrained network, on other images than those of the step and of the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from npeff.gradients import GradientCollector, LabelSpec, select_parameters
from npeff.statistics.paired_bootstrap import Interval, paired_difference
from npeff.training import (
    DiagonalPreconditioner,
    ExactPreconditioner,
    KroneckerPreconditioner,
    KroneckerSums,
    LowRankPreconditioner,
    kronecker_layers,
)
from npeff.training.low_rank import leading_eigenpairs, sketched_eigenvectors
from torch import Tensor, nn
from training_loops.digits import Part, convolutional, losses, parts

from natural_gradients.rows import dense_rows, logits, loss_gradient, sketched_rows

N, RANK, DIM = 150, 16, 4096
DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
LENGTHS = np.geomspace(0.02, 10, 16)
"""Lengths ‖η d‖ of the steps that are tried."""
SEEDS = (0, 1, 2, 3, 4)


def compared() -> dict[str, Any]:
    """Return the test losses of each kind: means over the seeds, of one step of the best damping and size."""
    training, validation, test = parts()
    part = training.some(torch.arange(N))
    losses_of: dict[str, list[np.ndarray]] = {}
    chosen: dict[str, list[dict[str, float]]] = {}
    for seed in SEEDS:
        model = convolutional(seed).double()
        start = losses(model, _double(test)).numpy()
        losses_of.setdefault("start", []).append(start)
        for kind, directions in _directions(model, part).items():
            best = min(
                (
                    (_loss_after(model, direction, length, validation).mean().item(), damping, length)
                    for damping, direction in directions.items()
                    for length in LENGTHS
                )
            )
            _, damping, length = best
            losses_of.setdefault(kind, []).append(_loss_after(model, directions[damping], length, test).numpy())
            chosen.setdefault(kind, []).append({"damping": damping, "length": length})
    return {
        kind: {
            "loss": float(np.mean(values)),
            "loss_of_seeds": [float(np.mean(value)) for value in values],
            "difference": _interval(paired_difference(np.concatenate(values), np.concatenate(losses_of["gradient"]))),
            "difference_of_seeds": [
                float(np.mean(mine - theirs)) for mine, theirs in zip(values, losses_of["gradient"], strict=True)
            ],
            "chosen": chosen.get(kind, []),
        }
        for kind, values in losses_of.items()
    }


def _interval(found: Interval) -> list[float]:
    return [found.mean, found.low, found.high]


def _directions(model: nn.Module, part: Part) -> dict[str, dict[float, dict[str, Tensor]]]:
    """Return the directions of each kind by damping."""
    rows, g = dense_rows(model, part), loss_gradient(model, part)
    sketch = sketched_rows(model, part, DIM)
    vectors_kn = sketched_eigenvectors(lambda: (sketch,), RANK)
    values_k, leading = leading_eigenpairs(vectors_kn, rows.block_weighted_sums, rows.block_products)
    diagonal = rows.parts(rows.rows_nP.square().sum(0))
    layout = select_parameters(model)
    sums = KroneckerSums.empty(kronecker_layers(model, layout), layout)
    collected = GradientCollector(model, logits, layout, LabelSpec()).collect(part.images.double())
    sums.add(collected, torch.ones(len(part.images), dtype=torch.bool))
    made = {
        "diagonal": lambda damping: DiagonalPreconditioner(diagonal, damping=damping),
        "kfac": lambda damping: KroneckerPreconditioner(sums, damping=damping),
        "low_rank": lambda damping: LowRankPreconditioner(values_k, leading, damping=damping),
        "exact": lambda damping: ExactPreconditioner(rows, damping=damping, sketched_rows=sketch),
    }
    found = {kind: {damping: of(damping).precondition(g) for damping in DAMPINGS} for kind, of in made.items()}
    return {"gradient": {0.0: g}, **found}


def _double(part: Part) -> Part:
    return Part(part.images.double(), part.classes)


def _loss_after(model: nn.Module, direction: dict[str, Tensor], length: float, part: Part) -> Tensor:
    norm = torch.stack([value.square().sum() for value in direction.values()]).sum().sqrt()
    values = {name: value - length / norm * direction[name] for name, value in model.named_parameters()}
    with torch.no_grad():
        found = torch.func.functional_call(model, values, (part.images.double(),))
    return nn.functional.cross_entropy(found, part.classes, reduction="none")
