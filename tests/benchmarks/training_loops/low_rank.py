"""Low-rank Fishers of a network and some examples: their leading directions, and their sketch.

Legend: n rows, k directions, P parameters, D coordinates.
"""

from __future__ import annotations

import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import LabelSpec, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from npeff.training import LowRankFisher
from torch import Tensor, nn

from training_loops.digits import Part

DIRECTIONS, IMAGES = 100, 300
LABELS = LabelSpec("truncated", 2)
"""The two largest eigenpairs of the labels' covariance of each example hold almost all of it after training."""


def _rows(model: nn.Module, part: Part, spec: SketchSpec, labels: LabelSpec) -> tuple[Tensor, PerExampleFishers]:
    """Return rows (n, D), float32, whose sum of outer products is the mean Fisher."""
    layout = select_parameters(model)
    fishers = PerExampleFishers(
        model, lambda network, images: network(images), layout, make_sketch(spec, layout, 0), labels
    )
    found = []
    for numbers in torch.arange(len(part.images)).split(100):
        found.append(fishers(part.images[numbers], numbers.tolist(), part.classes[numbers]).factors_BRD.flatten(0, 1))
    return torch.cat(found) / len(part.images) ** 0.5, fishers


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def leading_rows(model: nn.Module, part: Part) -> dict[str, Tensor]:
    """Return the leading eigenvectors of the mean Fisher times the roots of their eigenvalues: (k, *shape) by name.

    Of the first 300 images of the part only, because the time grows with the cube of their number.
    """
    rows_nP, fishers = _rows(model, part.some(torch.arange(IMAGES)), SketchSpec("identity"), LABELS)
    leading_kP = LowRankFisher(_shapes(model), fishers.sketch, rows_nD=rows_nP).leading(DIRECTIONS).rows_nD
    assert leading_kP is not None
    named = list(model.named_parameters())
    columns = leading_kP.split([value.numel() for _, value in named], 1)
    return {name: part.reshape(-1, *value.shape) for (name, value), part in zip(named, columns, strict=True)}


def rest_of_diagonal(diagonal: dict[str, Tensor], rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the diagonal without that of the rows."""
    return {name: (value - rows[name].square().sum(0)).clamp_min(0) for name, value in diagonal.items()}


def sketched_fisher(model: nn.Module, part: Part, dim: int) -> LowRankFisher:
    """Return the mean Fisher as a run with a tensor sketch stores it, with exact labels."""
    rows_nD, fishers = _rows(model, part, SketchSpec("tensorsketch", dim=dim), LabelSpec("exact"))
    return LowRankFisher(_shapes(model), fishers.sketch, moments_DD=rows_nD.T @ rows_nD)
