"""The gradient rows of some digits, whole and sketched.

Legend: N images, R rank, P parameters, n = N·R rows, D sketch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from npeff.fisher import PerExampleFishers
from npeff.gradients import GradientCollector, LabelSpec, ParameterLayout, select_parameters
from npeff.sketches import SketchSpec, make_sketch
from torch import Tensor, nn
from training_loops.digits import Part


def logits(model: nn.Module, images: Any) -> Tensor:
    found: Tensor = model(images)
    return found


@dataclass(frozen=True)
class DenseRows:
    """Rows that are in memory, as the `FisherRows` of `npeff.training`."""

    rows_nP: Tensor
    layout: ParameterLayout

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return dict(zip(self.layout.names, self.layout.shapes, strict=True))

    def products(self, direction: Mapping[str, Tensor]) -> Tensor:
        return self.rows_nP @ self.flat(direction)

    def weighted_sum(self, weights_n: Tensor) -> dict[str, Tensor]:
        return self.parts(weights_n @ self.rows_nP)

    def block_products(self, directions: Mapping[str, Tensor]) -> Tensor:
        columns = torch.cat([directions[name].flatten(1) for name in self.layout.names], dim=1)
        return columns @ self.rows_nP.T

    def block_weighted_sums(self, weights_kn: Tensor) -> dict[str, Tensor]:
        sums = [self.parts(each) for each in weights_kn @ self.rows_nP]
        return {name: torch.stack([each[name] for each in sums]) for name in self.layout.names}

    def flat(self, direction: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([direction[name].flatten() for name in self.layout.names]).double()

    def parts(self, vector: Tensor) -> dict[str, Tensor]:
        pieces = vector.split([math.prod(shape) for shape in self.layout.shapes])
        return {name: piece.reshape(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}

    def solved(self, damping: float, vector_P: Tensor) -> Tensor:
        """(F̄ + λI)⁻¹ times a vector, by the Gram matrix of the rows in float64."""
        gram_nn = self.rows_nP @ self.rows_nP.T
        gram_nn.diagonal().add_(damping)
        solved_n = torch.linalg.solve(gram_nn, self.rows_nP @ vector_P)
        result: Tensor = (vector_P - solved_n @ self.rows_nP) / damping
        return result


def dense_rows(model: nn.Module, part: Part) -> DenseRows:
    """The rows B = A/√N in float64. The model must be in float64."""
    layout = select_parameters(model)
    collected = GradientCollector(model, logits, layout, LabelSpec()).collect(part.images.double())
    scales_B11 = collected.labels.scales_B[:, None, None]
    parts = [collected.contributions[name].dense().flatten(2) * scales_B11 for name in layout.names]
    return DenseRows(torch.cat(parts, dim=2).flatten(0, 1) / len(part.images) ** 0.5, layout)


def sketched_rows(model: nn.Module, part: Part, dim: int) -> Tensor:
    """The rows (n, D) that `npeff fishers` would store."""
    layout = select_parameters(model)
    sketch = make_sketch(SketchSpec(dim=dim), layout, 0)
    found = PerExampleFishers(model, logits, layout, sketch)(part.images.double())
    result: Tensor = found.factors_BRD.float().flatten(0, 1) / len(part.images) ** 0.5
    return result


def loss_gradient(model: nn.Module, part: Part) -> dict[str, Tensor]:
    """The gradient of the mean loss."""
    names, values = zip(*model.named_parameters(), strict=True)
    loss = nn.functional.cross_entropy(model(part.images.to(values[0])), part.classes)
    return dict(zip(names, torch.autograd.grad(loss, values), strict=True))
