"""Predictions of a model on some examples: logits, KL divergences and accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 2**15
"""Logits whose KL divergences are computed at once."""


def kl_divergence(moved_logits_BC: Tensor, original_logits_BC: Tensor) -> Tensor:
    """Compute KL(p_moved ‖ p_original) of every example in nats, float64.

    The divergence is infinite where the moved logits are not finite.
    """
    moved_log_p, original_log_p = (z.double().log_softmax(-1) for z in (moved_logits_BC, original_logits_BC))
    kl_B = torch.where(moved_log_p.exp() > 0, moved_log_p.exp() * (moved_log_p - original_log_p), 0.0).sum(-1)
    return torch.where(torch.isfinite(moved_logits_BC).all(-1), kl_B.clamp_min(0.0), math.inf)


@dataclass(frozen=True)
class Predictions:
    """The predictions on some examples. An example has one or more predictions."""

    logits: list[Tensor]
    """For each example, the logits (n, C) of its n predictions."""
    classes: list[Tensor]
    """For each example, the classes (n,) of its predictions, UNKNOWN where a class is not known."""

    def at(self, places: Iterable[int]) -> Predictions:
        """Return the predictions on the examples at `places`. Places may repeat."""
        chosen = list(places)
        return Predictions([self.logits[place] for place in chosen], [self.classes[place] for place in chosen])

    def accuracy(self) -> float | None:
        """Compute the fraction of correct predictions among those of known class; None if no class is known."""
        classes = torch.cat(self.classes)
        predicted, known = torch.cat([logits.argmax(-1) for logits in self.logits]), classes >= 0
        return float((predicted == classes)[known].double().mean()) if known.any() else None

    def correct(self) -> NDArray[np.bool_]:
        """Return, for each example, whether all of its predictions are correct."""
        pairs = zip(self.logits, self.classes, strict=True)
        return np.array([bool((logits.argmax(-1) == classes).all()) for logits, classes in pairs], dtype=bool)

    def kl(self, original: Predictions) -> NDArray[np.float64]:
        """Compute KL(p ‖ p_original) of every example in nats, as the mean over the example's predictions.

        The result is NaN for an example without predictions.
        """
        means_N = [torch.empty(0, dtype=torch.float64)]
        for part in _blocks(self.logits):
            kl_n = kl_divergence(torch.cat(self.logits[part]), torch.cat(original.logits[part]))
            sizes = [len(logits) for logits in self.logits[part]]
            if max(sizes) == min(sizes) == 1:  # the mean of one number is the number
                means_N.append(kl_n)
            else:
                means_N.append(torch.stack([kl.mean() for kl in kl_n.split(sizes)]))
        return torch.cat(means_N).numpy()


def _blocks(logits: Sequence[Tensor]) -> Iterator[slice]:
    """Consecutive examples that have at most `_BLOCK` logits together, or one example that has more."""
    start, total = 0, 0
    for place, each in enumerate(logits):
        if place > start and total + each.numel() > _BLOCK:
            yield slice(start, place)
            start, total = place, 0
        total += each.numel()
    if start < len(logits):
        yield slice(start, len(logits))
