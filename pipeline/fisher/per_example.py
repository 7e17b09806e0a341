"""Fisher factors of a batch of examples: what one call of a worker computes.

Legend: B batch, C classes, R rank, D sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.fisher.capture import LogitsFunction
from pipeline.fisher.gradients import GradientCollector
from pipeline.fisher.label_factor import exact_label_factor
from pipeline.fisher.parameters import ParameterLayout
from pipeline.fisher.sketch import Sketch


@dataclass(frozen=True)
class FisherBatch:
    """Sketched Fisher factors and exact Grams; everything but the logits is zero for an example that is not valid."""

    factors_BRD: Tensor
    """A Qᵀ, not normalised, in the model's precision (at least float32)."""
    grams_BRR: Tensor
    """A Aᵀ in full coordinates, float64."""
    frobenius_norms_B: Tensor
    """‖F‖_F = ‖A Aᵀ‖_F, float64."""
    ranks_B: Tensor
    """Rows of the factor in use, int32."""
    logits_BC: Tensor
    valid_B: Tensor
    """False where a logit or a gradient is not finite."""


class PerExampleFishers:
    """Batches in, Fisher factors out: F = Jᵀ S J = AᵀA for each example, with A = Lᵀ J and S = L Lᵀ = diag(p) - p pᵀ.

    The factor is exact (R = C-1). An example's result does not depend on the others in its batch.
    Matena & Raffel, arXiv 2310.04649.
    """

    def __init__(self, model: nn.Module, logits_fn: LogitsFunction, layout: ParameterLayout, sketch: Sketch) -> None:
        self.collector = GradientCollector(model, logits_fn, layout, _near_unit_label_factor)
        self.sketch = sketch

    def __call__(self, batch: Any, n_examples: int | None = None) -> FisherBatch:
        """`n_examples` is needed only where the first tensor in the batch does not have the examples on its first axis.

        Raises UnsupportedModelError if the logits are not B×C or a layer cannot be handled.
        """
        collected = self.collector.collect(batch, n_examples)
        with torch.no_grad():
            scale_B11 = _scale(exact_label_factor(collected.logits_BC))
            factors_BRD = self.sketch.apply(collected.contributions)
            factors_BRD = factors_BRD * scale_B11.to(factors_BRD)
            grams_BRR = torch.stack([part.gram() for part in collected.contributions.values()]).sum(0) * scale_B11**2
        logits_BC = collected.logits_BC
        valid_B = (
            logits_BC.isfinite().all(1) & grams_BRR.isfinite().all(2).all(1) & factors_BRD.isfinite().all(2).all(1)
        )
        grams_BRR = grams_BRR.where(valid_B[:, None, None], 0)
        return FisherBatch(
            factors_BRD=factors_BRD.where(valid_B[:, None, None], 0),
            grams_BRR=grams_BRR,
            frobenius_norms_B=grams_BRR.flatten(1).norm(dim=1),
            ranks_B=valid_B.int() * grams_BRR.shape[1],
            logits_BC=logits_BC,
            valid_B=valid_B,
        )


def _near_unit_label_factor(logits_BC: Tensor) -> Tensor:
    """L over its scale, so that no product of gradients underflows in the model's precision: where a prediction is
    saturated, 1 - p = 1e-44 say, the rows' squares would be zero in float32."""
    factors_BCR = exact_label_factor(logits_BC)
    return factors_BCR / _scale(factors_BCR)


def _scale(label_factors_BCR: Tensor) -> Tensor:
    """(B, 1, 1) float64: the power of two next to the largest entry, division by which is exact; 1 where all are 0."""
    largest_B11 = label_factors_BCR.abs().amax(dim=(1, 2), keepdim=True)
    _, exponent_B11 = torch.frexp(largest_B11)
    return torch.ldexp(torch.ones_like(largest_B11), exponent_B11).where(largest_B11 > 0, 1)
