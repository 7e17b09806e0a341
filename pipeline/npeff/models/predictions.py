"""Predictions of a model on some examples: logits, KL divergences and accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.tasks import IGNORED

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

    logits: Sequence[Tensor] | Tensor
    """For each example, the logits (n, C) of its n predictions. One tensor (N, n, C) if n is the same for all."""
    classes: Sequence[Tensor] | Tensor
    """For each example, the classes (n,) of its predictions, UNKNOWN where a class is not known. One tensor (N, n) if
    `logits` is one tensor."""

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor) -> Predictions:
        """Return the predictions of a batch, on the CPU, with logits in float32.

        Args:
            logits: (B, C), or (B, T, C).
            targets: (B,) or (B, T), IGNORED at positions without a prediction.
        """
        if bool((targets != IGNORED).all()):
            logits, targets = logits.float().cpu(), targets.cpu()
            if logits.dim() == 2:
                return cls(logits[:, None], targets[:, None])
            return cls(list(logits), list(targets))  # views of the batch
        made = [classes != IGNORED for classes in targets]
        rows, classes = zip(logits, made, strict=True), zip(targets, made, strict=True)
        return cls(
            [row[which].float().reshape(-1, row.shape[-1]).cpu() for row, which in rows],
            [row[which].reshape(-1).cpu() for row, which in classes],
        )

    def at(self, places: Iterable[int]) -> Predictions:
        """Return the predictions on the examples at `places`. Places may repeat."""
        chosen = list(places)
        if isinstance(self.logits, Tensor) and isinstance(self.classes, Tensor):
            return Predictions(self.logits[chosen], self.classes[chosen])
        return Predictions([self.logits[place] for place in chosen], [self.classes[place] for place in chosen])

    def accuracy(self) -> float | None:
        """Compute the fraction of correct predictions among those of known class; None if no class is known."""
        classes, known = _flat(self.classes), _flat(self.classes) >= 0
        predicted = torch.cat([_flat(self.logits[part]).argmax(-1) for part in _blocks(self.logits)])
        return float((predicted == classes)[known].double().mean()) if known.any() else None

    def correct(self) -> NDArray[np.bool_]:
        """Return, for each example, whether all of its predictions are correct."""
        pairs = zip(self.logits, self.classes, strict=True)
        return np.array([bool((logits.argmax(-1) == classes).all()) for logits, classes in pairs], dtype=bool)

    def kl(self, original: Predictions) -> NDArray[np.float64]:
        """Compute KL(p ‖ p_original) of every example in nats, as the mean over the example's predictions.

        The result is NaN for an example without predictions.
        """
        return self._means(original, kl_divergence)

    def changed(self, original: Predictions) -> NDArray[np.float64]:
        """Compute the fraction of every example's predictions whose class differs from the original one.

        The result is NaN for an example without predictions.
        """
        return self._means(original, lambda moved, before: (moved.argmax(-1) != before.argmax(-1)).double())

    def log_confidence(self, original: Predictions) -> NDArray[np.float64]:
        """Compute log p of the class with the largest original logit, as the mean over every example's predictions.

        The result is NaN for an example without predictions.
        """

        def log_p(moved: Tensor, before: Tensor) -> Tensor:
            return moved.double().log_softmax(-1).gather(-1, before.argmax(-1, keepdim=True))[:, 0]

        return self._means(original, log_p)

    def _means(self, original: Predictions, of: Callable[[Tensor, Tensor], Tensor]) -> NDArray[np.float64]:
        """Compute the mean of a function of logits (n, C) and the original ones over every example's predictions."""
        means_N = [torch.empty(0, dtype=torch.float64)]
        for part in _blocks(self.logits):
            moved, before = self.logits[part], original.logits[part]
            values_n = of(_flat(moved), _flat(before))
            if isinstance(moved, Tensor):
                means_N.append(values_n.view(len(moved), -1).mean(1))
            else:
                means_N.append(torch.stack([each.mean() for each in values_n.split([len(row) for row in moved])]))
        return torch.cat(means_N).numpy()


def joined(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of all parts, in this order."""
    logits, classes = [part.logits for part in parts], [part.classes for part in parts]
    if parts and all(isinstance(each, Tensor) for each in logits):
        return Predictions(torch.cat(cast(list[Tensor], logits)), torch.cat(cast(list[Tensor], classes)))
    return Predictions([row for each in logits for row in each], [row for each in classes for row in each])


def _flat(values: Sequence[Tensor] | Tensor) -> Tensor:
    """The predictions of all examples on one axis."""
    return values.flatten(0, 1) if isinstance(values, Tensor) else torch.cat(tuple(values))


def _blocks(logits: Sequence[Tensor] | Tensor) -> Iterator[slice]:
    """Consecutive examples that have at most `_BLOCK` logits together, or one example that has more."""
    if isinstance(logits, Tensor):
        size = max(1, _BLOCK // max(1, logits[:1].numel()))
        yield from (slice(start, start + size) for start in range(0, len(logits), size))
        return
    start, total = 0, 0
    for place, each in enumerate(logits):
        if place > start and total + each.numel() > _BLOCK:
            yield slice(start, place)
            start, total = place, 0
        total += each.numel()
    if start < len(logits):
        yield slice(start, len(logits))
