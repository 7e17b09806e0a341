"""Fisher factors of a batch of examples: what one call of a worker computes.

Legend: B batch, T positions, C classes, R rank, D sketch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npeff.gradients import Collected, GradientCollector, LabelSpec, LogitsFunction, ParameterLayout
from npeff.gradients.sums import total_gram
from npeff.sketches import Sketch
from npeff.sketches.calibration import calibrated


@dataclass(frozen=True)
class FisherBatch:
    """Sketched Fisher factors and exact Grams; they are zero for an example that is not valid."""

    factors_BRD: Tensor
    """A Qᵀ, not normalised, in the model's precision (at least float32). With a sketch that keeps inner products on
    average only, the rows of each example are recombined so that their Gram matrix is exact (`calibration.py`)."""
    grams_BRR: Tensor
    """A Aᵀ in full coordinates, float64."""
    frobenius_norms_B: Tensor
    """‖F‖_F = ‖A Aᵀ‖_F, float64."""
    ranks_B: Tensor
    """Rows of the factor in use, int32."""
    kept_trace_B: Tensor
    """Share of the trace of the logits' Fisher matrix that the rows keep; NaN for sampled and empirical labels."""
    losses_B: Tensor
    """Mean of -log p of the known classes of an example's predictions; NaN where there is none."""
    logits: Tensor
    """(B, C) or (B, T, C)."""
    valid_B: Tensor
    """False where a logit or a gradient is not finite."""


class PerExampleFishers:
    """Batches in, Fisher factors out: F = Jᵀ S J = AᵀA for each example, with A = Lᵀ J and S = L Lᵀ = diag(p) - p pᵀ,
    or what the kind of labels has in its place.

    An example's result depends on the others in its batch by rounding only. Matena & Raffel, arXiv 2310.04649.
    """

    def __init__(
        self,
        model: nn.Module,
        logits_fn: LogitsFunction,
        layout: ParameterLayout,
        sketch: Sketch,
        labels: LabelSpec | None = None,
    ) -> None:
        self.collector = GradientCollector(model, logits_fn, layout, labels or LabelSpec())
        self.sketch = sketch

    def replica(self) -> PerExampleFishers:
        """One with the same sketch; see `GradientCollector.replica`."""
        copied = copy.copy(self)
        copied.collector = self.collector.replica()
        return copied

    def __call__(
        self, batch: Any, examples: Sequence[int] | int | None = None, targets: Tensor | None = None
    ) -> FisherBatch:
        """`examples` and `targets` as of `GradientCollector.collect`.

        Raises UnsupportedModelError if the logits or targets are of the wrong shape or a layer cannot be handled.
        """
        return self.factors(self.collector.collect(batch, examples, targets))

    def factors(self, collected: Collected) -> FisherBatch:
        """The factors of a batch whose gradient rows are there already."""
        logits, labels = collected.logits, collected.labels
        with torch.no_grad():
            scale_B11 = labels.scales_B[:, None, None]
            factors_BRD = self.sketch.apply(collected.contributions)
            grams_BRR = total_gram(collected.contributions.values())
            if self.sketch.calibrated:
                factors_BRD = calibrated(factors_BRD, grams_BRR)
            factors_BRD = factors_BRD * scale_B11.to(factors_BRD)
            grams_BRR = grams_BRR * scale_B11**2
        finite_B = labels.ranks_B.gt(0) | logits.flatten(1).isfinite().all(1)
        valid_B = finite_B & grams_BRR.flatten(1).isfinite().all(1) & factors_BRD.flatten(1).isfinite().all(1)
        grams_BRR = grams_BRR.where(valid_B[:, None, None], 0)
        return FisherBatch(
            factors_BRD=factors_BRD.where(valid_B[:, None, None], 0),
            grams_BRR=grams_BRR,
            frobenius_norms_B=grams_BRR.flatten(1).norm(dim=1),
            ranks_B=valid_B.int() * labels.ranks_B,
            kept_trace_B=labels.kept_trace_B,
            losses_B=labels.losses_B,
            logits=logits,
            valid_B=valid_B,
        )
