"""Labels: how the expectation over them is taken, and the directions in the logits that this gives.

A row of an example's Fisher factor is the gradient of ⟨direction, logits⟩ for one direction; the directions come from
the logits of the example's predictions, and from nothing else of the model. An example makes one prediction, or several
(the positions of a sequence).

    exact      L with L Lᵀ = diag(p) - p pᵀ, C-1 rows; for one prediction per example
    truncated  its largest eigenpairs
    sampled    draws ŷ ~ p of every prediction's label, rows Σ_t ∇log p(ŷ_t) / √R: unbiased, as the cross terms of
               independent draws vanish in expectation
    empirical  the given labels instead of draws: not the Fisher matrix (Kunstner, Balles & Hennig, arXiv 1905.12558)

Legend: B examples, T positions, n predictions of the batch, C classes, R rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pipeline.fisher.errors import UnsupportedModelError
from pipeline.fisher.label_factor import exact_label_factor, truncated_label_factor

Labels = Literal["exact", "truncated", "sampled", "empirical"]
IGNORED, UNKNOWN = -100, -1
"""In targets: no prediction is made here; a prediction whose class is not known."""
_BLOCK = 1 << 22
_MOST_CLASSES = 4096


@dataclass(frozen=True)
class LabelSpec:
    """How the expectation over labels is taken."""

    kind: Labels = "exact"
    rank: int | None = None
    """Rows of an example's factor: at most so many of `truncated`, the draws of `sampled`; None for the others."""
    kept_trace: float = 1.0
    """`truncated`: the share of the trace of S at which an example has enough rows."""
    seed: int = 0
    """Of the draws, together with the number of the example."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Labels):
            raise ValueError(f"labels must be one of {', '.join(get_args(Labels))}, not {self.kind!r}")
        if (self.rank is not None) != (self.kind in ("truncated", "sampled")):
            raise ValueError(f"labels {self.kind} {'need a' if self.rank is None else 'take no'} rank")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if not 0 < self.kept_trace <= 1 or (self.kept_trace < 1 and self.kind != "truncated"):
            raise ValueError("kept_trace is a share of the trace, above 0 and at most 1, and of truncated labels only")

    def max_rank(self, n_classes: int) -> int:
        """Rows that an example's factor has at most."""
        if self.kind == "exact":
            return n_classes - 1
        if self.kind == "truncated":
            assert self.rank is not None
            return min(self.rank, n_classes - 1)
        return self.rank or 1

    def to_json(self) -> dict[str, Any]:
        """Plain values, for a JSON attribute."""
        return {"kind": self.kind, "rank": self.rank, "kept_trace": self.kept_trace, "seed": self.seed}


@dataclass(frozen=True)
class LabelRows:
    """The directions of a batch, and what is known of its labels.

    The directions of each example are divided by a power of two that brings the largest entry near 1: where a
    prediction is saturated, 1 - p = 1e-44 say, products of gradients would underflow in the model's precision.
    """

    directions: Sequence[Tensor]
    """R tensors of the logits' shape and precision; zero for examples whose logits are not finite."""
    scales_B: Tensor
    """What they were divided by, float64."""
    ranks_B: Tensor
    """Directions in use, int32."""
    kept_trace_B: Tensor
    """Share of trace(S) that they keep, float64; NaN where that has no meaning (sampled, empirical)."""
    losses_B: Tensor
    """Mean of -log p over the example's predictions of known class, float64; NaN where there is none."""


def label_rows(
    spec: LabelSpec, logits: Tensor, examples: Sequence[int] | None = None, targets: Tensor | None = None
) -> LabelRows:
    """Directions of a batch of logits (B, C), or (B, T, C) with targets.

    Args:
        examples: the examples' numbers in the data set, which seed their draws; 0 … B-1 unless given.
        targets: int64 (B,) or (B, T): the class of each prediction, UNKNOWN, or IGNORED where none is made.

    Raises UnsupportedModelError if the targets do not fit, an example has more predictions than the kind of labels can
    take, or a label is missing that `empirical` needs.
    """
    predictions = _Predictions.of(logits, targets)
    if spec.kind in ("exact", "truncated"):
        return _factored(spec, predictions, logits)
    return _drawn(spec, predictions, logits, range(len(logits)) if examples is None else examples)


@dataclass(frozen=True)
class _Predictions:
    """The predictions of a batch, example by example."""

    mask: Tensor
    """(B,) or (B, T): where predictions are made that can be used."""
    examples_n: Tensor
    """Row of the batch that each belongs to."""
    logits_nC: Tensor
    targets_n: Tensor
    n_examples: int

    @classmethod
    def of(cls, logits: Tensor, targets: Tensor | None) -> _Predictions:
        shape = logits.shape[:-1]
        if targets is None:
            targets = logits.new_full(shape, UNKNOWN, dtype=torch.long)
        if targets.shape != shape:
            raise UnsupportedModelError(
                f"targets must be of shape {tuple(shape)}, as the logits, not {tuple(targets.shape)}"
            )
        made = targets != IGNORED
        if bool((made & ((targets < UNKNOWN) | (targets >= logits.shape[-1]))).any()):
            raise UnsupportedModelError(f"targets must be classes 0 to {logits.shape[-1] - 1}, {UNKNOWN} or {IGNORED}")
        finite_B = (logits.isfinite().all(-1) | ~made).reshape(len(logits), -1).all(1)
        mask = made & finite_B.reshape(-1, *[1] * (made.dim() - 1))
        return cls(mask, mask.nonzero()[:, 0], logits[mask], targets[mask], len(logits))

    def counts_B(self) -> Tensor:
        return torch.bincount(self.examples_n, minlength=self.n_examples)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Predictions a block at a time, and their log-probabilities (b, C) in float64."""
        size = max(1, _BLOCK // self.logits_nC.shape[1])
        for start in range(0, len(self.logits_nC), size):
            which = slice(start, start + size)
            yield which, torch.log_softmax(self.logits_nC[which].double(), dim=-1)

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
            f"{spec.kind} labels need examples with one prediction each, and here are some with {int(counts_B.max())}: "
            "use sampled labels, or make every position an example"
        )
    if n_classes > _MOST_CLASSES:
        raise UnsupportedModelError(f"{spec.kind} labels are for at most {_MOST_CLASSES} classes: use sampled ones")
    rank = spec.max_rank(n_classes)
    logits_nC = predictions.logits_nC
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
        direction[predictions.mask] = column_nC
        directions.append(direction)
    losses_n = torch.zeros_like(kept_n)
    for which, log_p in predictions.blocks():
        losses_n[which] = -log_p.gather(1, predictions.targets_n[which, None].clamp_min(0))[:, 0]
    nothing_B = torch.zeros_like(scales_B)
    return LabelRows(
        directions,
        scales_B,
        nothing_B.index_add(0, predictions.examples_n, ranks_n.double()).int(),
        nothing_B.add(1).index_copy(0, predictions.examples_n, kept_n),
        predictions.mean_losses_B(losses_n),
    )


def _drawn(spec: LabelSpec, predictions: _Predictions, logits: Tensor, examples: Sequence[int]) -> LabelRows:
    """Rows (e_ŷ - p) / √R of drawn or given labels ŷ."""
    rank, targets_n = spec.max_rank(logits.shape[-1]), predictions.targets_n
    if spec.kind == "empirical":
        if bool((targets_n < 0).any()):
            raise UnsupportedModelError("empirical labels need the label of every example: give them, or use sampled")
        labels_nR = targets_n[:, None]
        uniforms_nR = None
    else:
        labels_nR = targets_n.new_zeros(len(targets_n), rank)
        uniforms_nR = _uniforms(spec.seed, examples, predictions.counts_B().tolist(), rank).to(logits.device)
    others_nR = torch.zeros(labels_nR.shape, dtype=torch.float64, device=logits.device)
    losses_n = others_nR.new_zeros(len(targets_n))
    for which, log_p in predictions.blocks():
        p = log_p.exp()
        if uniforms_nR is not None:
            cumulated = p.cumsum(1)
            drawn = torch.searchsorted(cumulated, uniforms_nR[which] * cumulated[:, -1:], right=True)
            labels_nR[which] = drawn.clamp_max(p.shape[1] - 1)
        for row, label in enumerate(labels_nR[which].T):
            # 1 - p of the label, which subtraction would lose where it is small
            others_nR[which, row] = p.scatter(1, label[:, None], 0).sum(1)
        losses_n[which] = -log_p.gather(1, targets_n[which, None].clamp_min(0))[:, 0]
    scales_B = _power_of_two(predictions.largest_B(others_nR.amax(1)))
    inverse_n1 = (1 / scales_B)[predictions.examples_n, None] / rank**0.5
    precision = torch.promote_types(logits.dtype, torch.float32)
    scaled_nC = torch.empty(predictions.logits_nC.shape, dtype=precision, device=logits.device)
    for which, log_p in predictions.blocks():
        scaled_nC[which] = (log_p.exp() * inverse_n1[which]).to(precision)
    used_B = predictions.counts_B() > 0
    return LabelRows(
        _Draws(scaled_nC, labels_nR, (others_nR * inverse_n1).to(precision), predictions.mask, logits),
        scales_B,
        (used_B * rank).int(),
        torch.full_like(scales_B, torch.nan),
        predictions.mean_losses_B(losses_n),
    )


@dataclass(frozen=True)
class _Draws(Sequence[Tensor]):
    """The directions, each formed when it is asked for: with a large vocabulary one at a time is enough to hold."""

    scaled_nC: Tensor
    labels_nR: Tensor
    others_nR: Tensor
    mask: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return self.labels_nR.shape[1]

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        values_nC = self.scaled_nC.neg().scatter_(1, self.labels_nR[:, row, None], self.others_nR[:, row, None])
        direction = torch.zeros_like(self.logits)
        direction[self.mask] = values_nC.to(self.logits.dtype)
        return direction


def _uniforms(seed: int, examples: Sequence[int], counts: Sequence[int], rank: int) -> Tensor:
    """(n, R) in [0, 1): for each example's predictions in their order, from the seed and the example's number alone."""
    if len(examples) != len(counts):
        raise ValueError(f"{len(examples)} numbers of examples for a batch of {len(counts)}")
    drawn = [
        np.random.Generator(np.random.Philox(key=np.array([seed, example], np.uint64))).random((count, rank))
        for example, count in zip(examples, counts, strict=True)
    ]
    return torch.from_numpy(np.concatenate(drawn))


def _power_of_two(largest_B: Tensor) -> Tensor:
    """The power of two next to it, division by which is exact; 1 where it is 0."""
    _, exponent_B = torch.frexp(largest_B)
    return torch.ldexp(torch.ones_like(largest_B), exponent_B).where(largest_B > 0, 1)
