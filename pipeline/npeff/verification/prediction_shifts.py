"""What a step does to the answers of a model: changes of the predicted classes and of their probabilities.

All fractions and means are means over the examples of the mean over each example's predictions, like the KL divergences
of the verification.

Legend: n examples, b examples of a block, m predictions of a block, C classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LISTED = 10
"""Number of classes with the largest rise, and number with the largest fall of their mean probability, that are listed
if there are more classes than both numbers together."""

_BLOCK = 2**20
"""Number of probabilities that are computed at once, if an example has fewer."""

Logits = Sequence[Tensor] | Tensor
"""For each example, the logits (predictions, C)."""


@dataclass(frozen=True)
class ClassShift:
    """One class before and after a step."""

    number: int
    p_before: float
    """Mean probability of the class."""
    p_after: float
    share_before: float
    """Fraction of the predictions that are this class."""
    share_after: float


@dataclass(frozen=True)
class ExampleShift:
    """The prediction of an example that a step changes most, in KL divergence."""

    place: int
    """Number of the prediction among those of the example, from 0."""
    class_before: int
    class_after: int
    p_before: float
    """Probability of `class_before` before the step."""
    p_after: float
    """Probability of `class_before` after the step."""
    p_new: float
    """Probability of `class_after` after the step."""


@dataclass(frozen=True)
class Shifts:
    """What a step does to the predictions on n examples."""

    classes: list[ClassShift]
    """The listed classes, by number."""
    examples: list[ExampleShift | None]
    """One entry per example; None for an example without predictions."""
    flips: dict[tuple[int, int], float]
    """Fraction of the predictions that change from one class to another, by (class before, class after), the largest
    first."""


def shifts(before: Logits, after: Logits, listed: int = LISTED) -> Shifts:
    """Compare the predictions before and after a step.

    Args:
        before: Logits of the unmoved model.
        after: Logits of the moved model on the same examples.
        listed: See `LISTED`.

    Returns:
        The comparison. Logits that are not finite give probabilities of NaN.
    """
    lengths_n = np.array([len(logits) for logits in before], np.int64)
    examples: list[ExampleShift | None] = [None] * len(lengths_n)
    if not lengths_n.any():
        return Shifts([], examples, {})
    weights_n = 1 / (np.count_nonzero(lengths_n) * np.maximum(lengths_n, 1))
    n_classes = next(logits.shape[-1] for logits in before if len(logits))
    totals_4C, flips = np.zeros((4, n_classes)), defaultdict[tuple[int, int], float](float)
    for block in _blocks(lengths_n, n_classes):
        owner_m, place_m = _owners(lengths_n[block])
        unmoved_mC, moved_mC = (_log_p(logits[block]) for logits in (before, after))
        p_mC, q_mC = np.exp(unmoved_mC), np.exp(moved_mC)
        old_m, new_m, weight_m = unmoved_mC.argmax(1), moved_mC.argmax(1), weights_n[block][owner_m]
        totals_4C[:2] += weight_m @ p_mC, weight_m @ q_mC
        totals_4C[2:] += [np.bincount(each_m, weight_m, n_classes) for each_m in (old_m, new_m)]
        for place in np.flatnonzero(old_m != new_m):
            flips[int(old_m[place]), int(new_m[place])] += float(weight_m[place])
        with np.errstate(invalid="ignore"):
            kl_m = np.where(q_mC > 0, q_mC * (moved_mC - unmoved_mC), 0.0).sum(1)
        order = np.lexsort([-np.nan_to_num(kl_m, nan=np.inf), owner_m])
        for m in order[np.unique(owner_m[order], return_index=True)[1]].tolist():
            old, new = int(old_m[m]), int(new_m[m])
            p = (float(p_mC[m, old]), float(q_mC[m, old]), float(q_mC[m, new]))
            examples[block.start + owner_m[m]] = ExampleShift(int(place_m[m]), old, new, *p)
    ordered = sorted(flips.items(), key=lambda flip: (-flip[1], flip[0]))
    return Shifts(_listed(totals_4C, listed), examples, dict(ordered))


def _blocks(lengths_n: NDArray[np.int64], n_classes: int) -> Iterator[slice]:
    """Yield blocks of consecutive examples with at most `_BLOCK` probabilities, or with one example."""
    start, total = 0, 0
    for place, length in enumerate(lengths_n.tolist()):
        if place > start and (total + length) * n_classes > _BLOCK:
            yield slice(start, place)
            start, total = place, 0
        total += length
    yield slice(start, len(lengths_n))


def _owners(lengths_b: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for each prediction of a block, the place of its example in the block, and its own in the example."""
    owner_m = np.repeat(np.arange(len(lengths_b)), lengths_b)
    return owner_m, np.arange(len(owner_m)) - (np.cumsum(lengths_b) - lengths_b)[owner_m]


def _log_p(logits: Logits) -> NDArray[np.float64]:
    flat_mC = logits.flatten(0, 1) if isinstance(logits, Tensor) else torch.cat(tuple(logits))
    result: NDArray[np.float64] = flat_mC.double().log_softmax(-1).cpu().numpy()
    return result


def _listed(totals_4C: NDArray[np.float64], listed: int) -> list[ClassShift]:
    order = np.argsort(totals_4C[1] - totals_4C[0], kind="stable")
    chosen = order if len(order) <= 2 * listed else np.concatenate([order[:listed], order[-listed:]])
    return [ClassShift(number, *totals_4C[:, number].tolist()) for number in sorted(chosen.tolist())]
