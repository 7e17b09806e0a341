"""Fisher factors of a batch of examples.

Legend: B batch, T positions, C classes, R rank, D sketch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
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
    """Sketched Fisher factors and exact Gram matrices. Both are zero for an example that is not valid."""

    unit_factors_BRD: Tensor
    """A Qᵀ divided by √‖F‖_F, in the model's precision (at least float32); zero if ‖F‖_F is. If the sketch preserves
    inner products only on average, the rows of each example are recombined so that their Gram matrix is exact
    (`calibration.py`)."""
    grams_BRR: Tensor
    """A Aᵀ in all parameters, float64."""
    frobenius_norms_B: Tensor
    """‖F‖_F = ‖A Aᵀ‖_F, float64."""
    ranks_B: Tensor
    """Number of rows of the factor in use, int32."""
    kept_trace_B: Tensor
    """Fraction of the trace of the logits' Fisher matrix that the rows cover. NaN for sampled and empirical labels."""
    losses_B: Tensor
    """Mean of -log p over the example's predictions of known class. NaN if no class is known."""
    logits: Tensor
    """(B, C) or (B, T, C)."""
    valid_B: Tensor
    """False where a logit or a gradient is not finite."""

    @property
    def factors_BRD(self) -> Tensor:
        """A Qᵀ, not normalized. Rows of saturated predictions are zero where they leave the range of the precision."""
        roots_B11 = self.frobenius_norms_B.sqrt()[:, None, None]
        return self.unit_factors_BRD * roots_B11.to(self.unit_factors_BRD)


class PerExampleFishers:
    """Computes Fisher factors of batches: F = Jᵀ S J = AᵀA for each example.

    A = Lᵀ J with S = L Lᵀ = diag(p) - p pᵀ for exact labels. Other kinds of labels replace L (`LabelSpec`). The result
    of an example depends on the other examples in the batch only by rounding. Source: Matena & Raffel,
    arXiv 2310.04649.
    """

    def __init__(
        self,
        model: nn.Module,
        logits_fn: LogitsFunction,
        layout: ParameterLayout,
        sketch: Sketch,
        labels: LabelSpec | None = None,
        one: Callable[[int], tuple[Any, Tensor | None]] | None = None,
    ) -> None:
        self.collector = GradientCollector(model, logits_fn, layout, labels or LabelSpec(), one)
        self.sketch = sketch

    def replica(self) -> PerExampleFishers:
        """Return a copy with the same sketch and a replica of the collector. See `GradientCollector.replica`."""
        copied = copy.copy(self)
        copied.collector = self.collector.replica()
        return copied

    def __call__(
        self, batch: Any, examples: Sequence[int] | int | None = None, targets: Tensor | None = None
    ) -> FisherBatch:
        """Compute the Fisher factors of a batch. Arguments and exceptions are those of `GradientCollector.collect`."""
        return self.factors(self.collector.collect(batch, examples, targets))

    def factors(self, collected: Collected) -> FisherBatch:
        """Compute the Fisher factors of a batch from its collected gradient rows."""
        logits, labels = collected.logits, collected.labels
        with torch.no_grad():
            scale_B11 = labels.scales_B[:, None, None]
            scaled_BRD = self.sketch.apply(collected.contributions)
            grams_BRR = total_gram(collected.contributions.values())
            if self.sketch.calibrated:
                scaled_BRD = calibrated(scaled_BRD, grams_BRR)
            # the squares of the entries of a Gram matrix may leave the range of float64, those of the scaled one do not
            norms_B = grams_BRR.flatten(1).norm(dim=1)
            grams_BRR, frobenius_B = grams_BRR * scale_B11**2, norms_B * labels.scales_B**2
            unit_B11 = torch.where(frobenius_B > 0, norms_B, math.inf).rsqrt()[:, None, None]
        finite_B = labels.ranks_B.gt(0) | logits.flatten(1).isfinite().all(1)
        valid_B = finite_B & grams_BRR.flatten(1).isfinite().all(1) & scaled_BRD.flatten(1).isfinite().all(1)
        valid_B11 = valid_B[:, None, None]
        return FisherBatch(
            unit_factors_BRD=(scaled_BRD * unit_B11.to(scaled_BRD)).where(valid_B11, 0),
            grams_BRR=grams_BRR.where(valid_B11, 0),
            frobenius_norms_B=frobenius_B.where(valid_B, 0),
            ranks_B=valid_B.int() * labels.ranks_B,
            kept_trace_B=labels.kept_trace_B,
            losses_B=labels.losses_B,
            logits=logits,
            valid_B=valid_B,
        )
