"""The rows of a batch, joined from the rows of its examples, each of which was computed alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import Tensor

from npeff.gradients.contribution import Contribution, Dense
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.labels import LabelRows
from npeff.gradients.outer import Outer
from npeff.gradients.routed import Routed
from npeff.gradients.sums import Sum


def joined_labels(parts: Sequence[LabelRows]) -> LabelRows:
    """Join the label rows of several examples. Positions are padded with zeros."""
    return LabelRows(
        directions=[padded(rows) for rows in zip(*(part.directions for part in parts), strict=True)],
        scales_B=torch.cat([part.scales_B for part in parts]),
        ranks_B=torch.cat([part.ranks_B for part in parts]),
        kept_trace_B=torch.cat([part.kept_trace_B for part in parts]),
        losses_B=torch.cat([part.losses_B for part in parts]),
    )


def joined_contributions(parts: Sequence[Contribution | None]) -> Contribution:
    """Join the contributions of one parameter to the rows of several examples.

    Args:
        parts: One contribution per example, with one example each. None where the logits of an example do not depend on
            the parameter. At least one is not None.

    Returns:
        The contribution to the rows of all examples, in the same form. Positions are padded with zeros.
    """
    simple = [{_key(piece): piece for piece in _pieces(part)} for part in parts]
    keys = dict.fromkeys(key for pieces in simple for key in pieces)
    found = [_joined([pieces.get(key) for pieces in simple]) for key in keys]
    return found[0] if len(found) == 1 else Sum(tuple(found))


def padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors on the first axis. Their other axes are padded with zeros to the largest size."""
    sizes = [max(size) for size in zip(*(part.shape[1:] for part in parts), strict=True)]
    result = parts[0].new_zeros(sum(len(part) for part in parts), *sizes)
    start = 0
    for part in parts:
        result[(slice(start, start + len(part)), *(slice(size) for size in part.shape[1:]))] = part
        start += len(part)
    return result


def _pieces(part: Contribution | None) -> tuple[Contribution, ...]:
    if part is None:
        return ()
    return part.parts if isinstance(part, Sum) else (part,)


def _key(piece: Contribution) -> Hashable:
    """Return a key that is equal for contributions that can be joined. `sums.add` returns at most one of each key."""
    return (piece.inputs_first, piece.inputs_BGTi.shape[1]) if isinstance(piece, Outer) else type(piece)


def _joined(pieces: Sequence[Contribution | None]) -> Contribution:
    """Join contributions with the same key; zero where there is none."""
    first = next(piece for piece in pieces if piece is not None)
    if isinstance(first, Outer):
        outers = cast(Sequence[Outer | None], pieces)
        empty = first.inputs_BGTi.new_zeros(1, first.inputs_BGTi.shape[1], 0, first.inputs_BGTi.shape[3])
        inputs = padded([empty if piece is None else piece.inputs_BGTi for piece in outers])
        no_deltas = tuple(row.new_zeros(1, row.shape[1], 0, row.shape[3]) for row in first.deltas)
        deltas = zip(*(no_deltas if piece is None else piece.deltas for piece in outers), strict=True)
        return Outer(tuple(padded(row) for row in deltas), inputs, first.shape, first.inputs_first)
    if isinstance(first, Rows):
        rows = cast(Sequence[Rows | None], pieces)
        none = first.deltas_BTRi[:, :0], first.indices_BT[:, :0]
        both = [none if piece is None else (piece.deltas_BTRi, piece.indices_BT) for piece in rows]
        return Rows(padded([deltas for deltas, _ in both]), padded([indices for _, indices in both]), first.shape)
    if isinstance(first, Routed):
        present = [number for number, piece in enumerate(pieces) if piece is not None]
        return Routed.joined(cast(list[Routed], [pieces[number] for number in present]), present, len(pieces))
    zero = torch.zeros_like(first.dense())
    return Dense(torch.cat([zero if piece is None else piece.dense() for piece in pieces]))
