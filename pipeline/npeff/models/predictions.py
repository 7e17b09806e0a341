"""What a model predicts for some examples: logits, KL divergences, accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def kl_divergence(moved_logits_BC: Tensor, original_logits_BC: Tensor) -> Tensor:
    """KL(p_moved ‖ p_original) of every example, nats, in float64; infinite where the moved logits are not finite."""
    moved_log_p, original_log_p = (z.double().log_softmax(-1) for z in (moved_logits_BC, original_logits_BC))
    kl_B = torch.where(moved_log_p.exp() > 0, moved_log_p.exp() * (moved_log_p - original_log_p), 0.0).sum(-1)
    return torch.where(torch.isfinite(moved_logits_BC).all(-1), kl_B.clamp_min(0.0), math.inf)


@dataclass(frozen=True)
class Predictions:
    """Of some examples, each with one prediction or several: their logits (n, C), and their classes (n,), UNKNOWN where
    they are not known."""

    logits: list[Tensor]
    classes: list[Tensor]

    def at(self, places: Iterable[int]) -> Predictions:
        """Those at these places, which may be named again."""
        chosen = list(places)
        return Predictions([self.logits[place] for place in chosen], [self.classes[place] for place in chosen])

    def accuracy(self) -> float | None:
        """Share of right ones among the predictions of known class; None if there are none."""
        classes = torch.cat(self.classes)
        predicted, known = torch.cat([logits.argmax(-1) for logits in self.logits]), classes >= 0
        return float((predicted == classes)[known].double().mean()) if known.any() else None

    def correct(self) -> NDArray[np.bool_]:
        """Of each example, whether all its predictions are of its classes."""
        pairs = zip(self.logits, self.classes, strict=True)
        return np.array([bool((logits.argmax(-1) == classes).all()) for logits, classes in pairs], dtype=bool)

    def kl(self, original: Predictions) -> NDArray[np.float64]:
        """KL(p ‖ p_original) of every example, nats: the mean over its predictions, NaN where it has none."""
        pairs = zip(self.logits, original.logits, strict=True)
        means = [kl_divergence(moved, before).mean() for moved, before in pairs]
        return torch.stack(means).numpy() if means else np.empty(0)
