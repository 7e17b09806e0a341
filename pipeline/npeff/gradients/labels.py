"""Label rows: the directions in logit space for each kind of expectation over labels.

A row of an example's Fisher factor is the gradient of ⟨direction, logits⟩ for one direction. The directions depend only
on the logits of the example's predictions. An example makes one prediction, or several (the positions of a sequence).

    exact      L with L Lᵀ = diag(p) - p pᵀ: C-1 rows, for one prediction per example
    truncated  the largest eigenpairs of L Lᵀ, for one prediction per example
    sampled    R draws ŷ ~ p of the label of every prediction: rows Σ_t ∇log p(ŷ_t) / √R. The estimate is unbiased,
               because the cross terms of independent draws have zero expectation
    empirical  the given labels in place of draws. This is not the Fisher matrix (Kunstner, Balles & Hennig,
               arXiv 1905.12558)

Legend: B examples, T positions, n predictions of the batch, C classes, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from npeff.gradients.errors import UnsupportedModelError
from npeff.gradients.label_factor import exact_label_factor, truncated_label_factor
from npeff.options.labels import MOST_CLASSES, LabelSpec

IGNORED, UNKNOWN = -100, -1
"""Values in targets: IGNORED marks a position without a prediction, UNKNOWN a prediction whose class is not known."""
_BLOCK = 1 << 20
"""Number of elements per block of work, chosen so that a block fits in the cache."""
_SATURATED = 1e-20
"""Where 1 - p of the label is below this value, the probabilities of the other classes are computed in float64."""


@dataclass(frozen=True)
class LabelRows:
    """The directions of a batch, with the ranks, kept traces and losses of its examples.

    The directions of each example are divided by a power of two that brings their largest entry near 1. Without this
    scaling, products of gradients would underflow in the model's precision for saturated predictions (for example,
    1 - p = 1e-44).
    """

    directions: Sequence[Tensor]
    """R tensors with the shape and dtype of the logits. They are zero for examples whose logits are not finite."""
    scales_B: Tensor
    """The divisors of the directions, float64."""
    ranks_B: Tensor
    """Number of directions in use, int32."""
    kept_trace_B: Tensor
    """Fraction of trace(S) that the directions cover, float64. NaN for sampled and empirical labels."""
    losses_B: Tensor
    """Mean of -log p over the example's predictions of known class, float64. NaN if no class is known."""


def label_rows(
    spec: LabelSpec, logits: Tensor, examples: Sequence[int] | None = None, targets: Tensor | None = None
) -> LabelRows:
    """Compute the directions of a batch.

    Args:
        spec: The kind of labels and its options.
        logits: (B, C), or (B, T, C) with targets.
        examples: The numbers of the examples in the data set, which seed their draws. The default is 0, …, B-1.
        targets: int64 (B,) or (B, T): the class of each prediction, UNKNOWN, or IGNORED where there is no prediction.

    Returns:
        The directions, with their scales, ranks, kept traces and losses.

    Raises:
        UnsupportedModelError: The targets do not fit the logits, an example has more predictions than the kind of
            labels supports, or a label is missing for `empirical`.
    """
    predictions = _Predictions.of(logits, targets)
    if spec.kind in ("exact", "truncated"):
        return _factored(spec, predictions, logits)
    return _drawn(spec, predictions, logits, range(len(logits)) if examples is None else examples)


@dataclass(frozen=True)
class _Predictions:
    """The usable predictions of a batch, ordered by example."""

    places_n: Tensor
    """Flat positions of the usable predictions among the B or B·T positions."""
    examples_n: Tensor
    """Row of the batch to which each prediction belongs."""
    targets_n: Tensor
    n_examples: int

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor | None) -> _Predictions:
        shape = logits.shape[:-1]
        if targets is None:
            targets = logits.new_full(shape, UNKNOWN, dtype=torch.long)
        if targets.shape != shape:
            raise UnsupportedModelError(
                f"targets must have the shape {tuple(shape)} to match the logits, not {tuple(targets.shape)}"
            )
        made = targets != IGNORED
        if bool((made & ((targets < UNKNOWN) | (targets >= logits.shape[-1]))).any()):
            raise UnsupportedModelError(f"targets must be classes 0 to {logits.shape[-1] - 1}, {UNKNOWN} or {IGNORED}")
        # testing the sum for finiteness takes a thirtieth of the time of testing every entry
        finite = logits.sum(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).isfinite()
        finite_B = (finite | ~made).reshape(len(logits), -1).all(1)
        mask = made & finite_B.reshape(-1, *[1] * (made.dim() - 1))
        return cls(mask.flatten().nonzero()[:, 0], mask.nonzero()[:, 0], targets[mask], len(logits))

    def counts_B(self) -> Tensor:
        return torch.bincount(self.examples_n, minlength=self.n_examples)

    def mean_losses_B(self, losses_n: Tensor) -> Tensor:
        known_n = (self.targets_n >= 0).double()
        total_B = known_n.new_zeros(self.n_examples).index_add_(0, self.examples_n, losses_n * known_n)
        return total_B / known_n.new_zeros(self.n_examples).index_add_(0, self.examples_n, known_n)

    def largest_B(self, values_n: Tensor) -> Tensor:
        found = values_n.new_zeros(self.n_examples)
        return found.scatter_reduce_(0, self.examples_n, values_n, "amax")


def _factored(spec: LabelSpec, predictions: _Predictions, logits: Tensor) -> LabelRows:
    counts_B = predictions.counts_B()
    n_classes = logits.shape[-1]
    if int(counts_B.max()) > 1:
        raise UnsupportedModelError(
            f"{spec.kind} labels need examples with one prediction each, but an example has {int(counts_B.max())}: "
            "use sampled labels, or make every position a separate example"
        )
    if n_classes > MOST_CLASSES:
        raise UnsupportedModelError(f"{spec.kind} labels support at most {MOST_CLASSES} classes: use sampled labels")
    rank = spec.max_rank(n_classes)
    logits_nC = logits.flatten(0, -2)[predictions.places_n]
    if spec.kind == "exact":
        factor_nCR = exact_label_factor(logits_nC)
        ranks_n = torch.full_like(predictions.targets_n, rank)
        kept_n = torch.ones_like(factor_nCR[:, 0, 0])
    else:
        factor_nCR, ranks_n, kept_n = truncated_label_factor(logits_nC, rank, spec.kept_trace)
    scales_B = _power_of_two(predictions.largest_B(factor_nCR.abs().amax(dim=(1, 2))))
    factor_nCR = factor_nCR / scales_B[predictions.examples_n, None, None]
    directions = []
    for column_nC in factor_nCR.to(logits.dtype).unbind(2):
        direction = torch.zeros_like(logits)
        direction.flatten(0, -2)[predictions.places_n] = column_nC
        directions.append(direction)
    nothing_B = torch.zeros_like(scales_B)
    return LabelRows(
        directions,
        scales_B,
        nothing_B.index_add(0, predictions.examples_n, ranks_n.double()).int(),
        nothing_B.add(1).index_copy(0, predictions.examples_n, kept_n),
        predictions.mean_losses_B(_losses(logits_nC, predictions.targets_n)),
    )


def _drawn(spec: LabelSpec, predictions: _Predictions, logits: Tensor, examples: Sequence[int]) -> LabelRows:
    """Compute the rows (e_ŷ - p) / √R of drawn or given labels ŷ."""
    rank, targets_n, examples_n = spec.max_rank(logits.shape[-1]), predictions.targets_n, predictions.examples_n
    if spec.kind == "empirical":
        if bool((targets_n < 0).any()):
            raise UnsupportedModelError("empirical labels need a label for every example: add labels, or use sampled")
        labels_nR, uniforms_nR = targets_n[:, None], None
    else:
        labels_nR = targets_n.new_zeros(len(targets_n), rank)
        uniforms_nR = _uniforms(spec.seed, examples, predictions.counts_B().tolist(), rank).to(logits.device)
    precision = torch.promote_types(logits.dtype, torch.float32)
    p_xC = torch.zeros(logits.shape, dtype=precision, device=logits.device).flatten(0, -2)
    divided_n = torch.ones(len(targets_n), dtype=torch.float64, device=logits.device)
    losses_n, complements_nR = divided_n.new_zeros(len(targets_n)), divided_n.new_zeros(labels_nR.shape)
    size = max(1, _BLOCK // logits.shape[-1])
    for start in range(0, len(targets_n), size):
        which = slice(start, start + size)
        logits_nC = logits.flatten(0, -2)[predictions.places_n[which]]
        p_nC = logits_nC.to(precision).softmax(-1)
        if uniforms_nR is not None:
            labels_nR[which] = _draw(p_nC, uniforms_nR[which])
        complements_nR[which] = _complements(p_nC, labels_nR[which])
        saturated_n = complements_nR[which].amin(1) < _SATURATED
        if saturated_n.any():
            exact_nC = logits_nC[saturated_n].double().softmax(-1)
            complements_nR[which][saturated_n] = _complements(exact_nC, labels_nR[which][saturated_n])
            divided_n[which][saturated_n] = _power_of_two(complements_nR[which][saturated_n].amax(1))
            p_nC[saturated_n] = (exact_nC / divided_n[which][saturated_n, None]).to(precision)
        p_xC[predictions.places_n[which]] = p_nC
        losses_n[which] = _losses(logits_nC, targets_n[which])
    scales_B = _power_of_two(predictions.largest_B(complements_nR.amax(1)))
    inverse_n = (1 / scales_B)[examples_n] / rank**0.5
    factors_x = inverse_n.new_zeros(len(p_xC)).index_copy_(0, predictions.places_n, -divided_n * inverse_n)
    p_xC *= factors_x[:, None].to(precision)
    used_B = predictions.counts_B() > 0
    scaled_complements_nR = complements_nR * inverse_n[:, None]
    return LabelRows(
        _Draws(p_xC.view(logits.shape), labels_nR, scaled_complements_nR, predictions.places_n, logits.dtype),
        scales_B,
        (used_B * rank).int(),
        torch.full_like(scales_B, torch.nan),
        predictions.mean_losses_B(losses_n),
    )


def _draw(p_nC: Tensor, uniforms_nR: Tensor) -> Tensor:
    """Draw classes (n, R) by inverting the cumulative probabilities."""
    cumulated_nC = p_nC.cumsum(1)
    drawn_nR = torch.searchsorted(cumulated_nC, (uniforms_nR * cumulated_nC[:, -1:]).to(p_nC), right=True)
    return drawn_nR.clamp_max(p_nC.shape[1] - 1)


def _complements(p_nC: Tensor, labels_nR: Tensor) -> Tensor:
    """Compute 1 - p of each label (n, R) as a sum over the other classes. Subtraction would lose small values."""
    sums = []
    for label_n1 in labels_nR.split(1, dim=1):
        label_p_n1 = p_nC.gather(1, label_n1)
        sums.append(p_nC.scatter_(1, label_n1, 0).sum(1))
        p_nC.scatter_(1, label_n1, label_p_n1)
    return torch.stack(sums, dim=1).double()


def _losses(logits_nC: Tensor, targets_n: Tensor) -> Tensor:
    """Compute -log p of the known targets, float64. The loss of an unknown target is 0."""
    known_n = targets_n >= 0
    if not known_n.any():
        return torch.zeros(len(targets_n), dtype=torch.float64, device=logits_nC.device)
    precision = torch.promote_types(logits_nC.dtype, torch.float32)
    return functional.cross_entropy(logits_nC.to(precision), targets_n, ignore_index=UNKNOWN, reduction="none").double()


@dataclass(frozen=True)
class _Draws(Sequence[Tensor]):
    """The directions, each formed on access: with a large vocabulary, memory should hold only one at a time."""

    scaled: Tensor
    """-p / √R of each prediction, divided by the scale of the example. It has the shape of the logits and is zero where
    there is no prediction."""
    labels_nR: Tensor
    complements_nR: Tensor
    """(1 - p) / √R of each drawn label, divided by the scale of the example."""
    places_n: Tensor
    dtype: torch.dtype

    def __len__(self) -> int:
        return self.labels_nR.shape[1]

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        direction = self.scaled.clone()
        direction.flatten(0, -2)[self.places_n, self.labels_nR[:, row]] = self.complements_nR[:, row].to(direction)
        return direction.to(self.dtype)


def _uniforms(seed: int, examples: Sequence[int], counts: Sequence[int], rank: int) -> Tensor:
    """Draw uniform numbers (n, R) in [0, 1) for the predictions of each example, in order.

    The numbers of an example depend only on the seed and the number of the example.
    """
    if len(examples) != len(counts):
        raise ValueError(f"{len(examples)} example numbers for a batch of {len(counts)} examples")
    drawn = [
        np.random.Generator(np.random.Philox(key=np.array([seed, example], np.uint64))).random((count, rank))
        for example, count in zip(examples, counts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(drawn))


def _power_of_two(largest_B: Tensor) -> Tensor:
    """Return the next power of two, by which division is exact. Return 1 where the value is 0."""
    _, exponent_B = torch.frexp(largest_B)
    return torch.ldexp(torch.ones_like(largest_B), exponent_B).where(largest_B > 0, 1)
