"""Diagonals of per-example Fisher matrices, f_b = Σ_r A_br ∘ A_br, from the contributions of one gradient pass.

The diagonals are exact. They are never formed for the whole batch: memory holds them for one parameter and one block of
examples at a time. The functions return small results: sums over groups of entries, the norm, and the weighted sum over
examples (`top_entries.py` returns the largest entries). Elastic weight consolidation and natural-gradient
preconditioning use the mean of the diagonals over a data set. Contributions are divided by `LabelRows.scales_B`, and
every function multiplies by these scales in float64.

An example that is not finite affects only its own results. The caller excludes it, in `diagonal_sum` with weight 0.

Legend: B batch, R rank, T positions, G groups of a convolution, o outputs and i inputs of a group, P parameters, x
entries of one parameter, n distinct rows of an embedding in use by an example, k largest entries, Q groups of entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from npeff.fisher.output_units import GroupLayout
from npeff.gradients.contribution import Contribution, blocks, cached_elements
from npeff.gradients.embedding_rows import Rows
from npeff.gradients.outer import Outer
from npeff.gradients.routed import Routed
from npeff.gradients.sums import Sum


@torch.no_grad()
def diagonal_sum(
    contributions: Mapping[str, Contribution],
    scales_B: Tensor,
    weights_KB: Tensor,
    total: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Compute Σ_b w_kb f_b for each row k of the weights.

    Args:
        contributions: Contributions by parameter name.
        scales_B: Divisors of the contributions, float64.
        weights_KB: Weights of the examples. An example whose weights are all 0 has no effect, even if its rows are not
            finite.
        total: Tensors (K, *shape) to which the sums are added in place, in the dtype of these tensors. The default is
            new float64 tensors. Entries of parameters without a contribution remain unchanged.

    Returns:
        The sums (K, *shape) by parameter name; `total`, if given.
    """
    total = {} if total is None else total
    weights_KB = weights_KB.to(scales_B) * scales_B.square()
    used_B = (weights_KB != 0).any(0)
    # the weight of a saturated prediction (for example, 1e-80) must not round to zero where rows are float32
    largest = float(weights_KB.abs().max()) if used_B.any() else 1.0
    weights_KB = weights_KB[:, used_B] / largest
    for name, part in contributions.items():
        if name not in total:
            total[name] = part.new_zeros(len(weights_KB), *part.shape).double()
        if not used_B.all():
            part = part.examples(used_B)
        _add_weighted(part, weights_KB, largest, total[name])
    return total


def _add_weighted(part: Contribution, weights_KB: Tensor, factor: float, total: Tensor) -> None:
    """Add factor · Σ_b w_kb f_b to `total` (K, *shape) in place."""
    weights_KB = weights_KB.to(part.new_zeros(0))
    if isinstance(part, Rows):
        examples_n, rows_n, diagonal_ni = looked_up(part)
        for weights_B, sums in zip(weights_KB, total, strict=True):
            sums.index_add_(0, rows_n, (diagonal_ni * weights_B[examples_n, None]).to(sums), alpha=factor)
        return
    if isinstance(part, Routed):
        for expert, examples_e, outer in part.by_expert():
            _add_weighted(outer, weights_KB[:, examples_e], factor, total[:, expert])
        return
    sides = _one_position(part) if isinstance(part, Outer) else None
    if sides is not None:
        left_GxB, right_GBx = sides[0].permute(1, 2, 0), sides[1].transpose(0, 1)
        for weights_B, sums in zip(weights_KB, total, strict=True):
            sums.add_(((left_GxB * weights_B) @ right_GBx).reshape(sums.shape), alpha=factor)
        return
    for start, stop, diagonal_bx in diagonal_blocks(part):
        total.add_((weights_KB[:, start:stop] @ diagonal_bx).reshape(total.shape), alpha=factor)


@torch.no_grad()
def diagonal_norms(contributions: Mapping[str, Contribution], scales_B: Tensor) -> Tensor:
    """Compute ‖f‖₂ of each example: (B,), float64."""
    squares_B = torch.zeros_like(scales_B)
    for part in contributions.values():
        _add_squares(part, squares_B)
    return squares_B.sqrt() * scales_B.square()


def _add_squares(part: Contribution, squares_B: Tensor) -> None:
    """Add the squared norms of the diagonals."""
    sides = _one_position(part) if isinstance(part, Outer) else None
    if sides is not None:
        left_BG, right_BG = (side.double().square().sum(2) for side in sides)
        squares_B += (left_BG * right_BG).sum(1)
    elif isinstance(part, Rows):
        examples_n, _, diagonal_ni = looked_up(part)
        squares_B.index_add_(0, examples_n, norms_of(diagonal_ni).square())
    elif isinstance(part, Routed):
        for _, examples_e, outer in part.by_expert():
            found_e = squares_B.new_zeros(len(examples_e))
            _add_squares(outer, found_e)
            squares_B.index_add_(0, examples_e, found_e)
    else:
        for start, stop, diagonal_bx in diagonal_blocks(part):
            squares_B[start:stop] += norms_of(diagonal_bx).square()


@torch.no_grad()
def grouped_sums(contributions: Mapping[str, Contribution], scales_B: Tensor, groups: GroupLayout) -> Tensor:
    """Compute the sums of the entries of f over each group of `groups`: (B, Q), float64, not negative.

    The sum over all groups is trace(F).
    """
    sums_BQ = scales_B.new_zeros(len(scales_B), groups.n_groups)
    for name, part in contributions.items():
        axis, first = groups.parts[name]
        count = 1 if axis is None else part.shape[axis]
        sums_BQ[:, first : first + count] += _sums_along(part, axis)
    return sums_BQ * scales_B.square()[:, None]


def _sums_along(part: Contribution, axis: int | None) -> Tensor:
    """Compute the sums of the diagonals over all axes except `axis`: (B, shape[axis]), float64."""
    if isinstance(part, Outer) and axis == int(part.inputs_first) and not _forming_is_cheaper(part):
        return _output_sums(part)
    if isinstance(part, Rows) and axis == 1:
        examples_n, _, diagonal_ni = looked_up(part)
        sums_Bi = diagonal_ni.new_zeros(part.n_examples, part.shape[1], dtype=torch.float64)
        return sums_Bi.index_add_(0, examples_n, diagonal_ni.double())
    if isinstance(part, Routed) and axis == 0:
        sums_BE = torch.zeros(part.n_examples, part.shape[0], dtype=torch.float64, device=part.inputs_ni.device)
        for expert, examples_e, outer in part.by_expert():
            sums_BE[examples_e, expert] = outer.gram().diagonal(dim1=1, dim2=2).sum(1).clamp_min_(0)
        return sums_BE
    shape, kept = (part.shape, axis + 1) if axis is not None else ((1,), 1)
    sums = []
    for _, _, diagonal_bx in diagonal_blocks(part):
        diagonal = diagonal_bx.unflatten(1, shape).movedim(kept, 1).reshape(len(diagonal_bx), shape[kept - 1], -1)
        sums.append(diagonal.sum(2, dtype=torch.float64))
    return torch.cat(sums)


def _forming_is_cheaper(outer: Outer) -> bool:
    """Return whether forming the rows is cheaper than `_output_sums`.

    A formed entry is also squared and added, which costs about as much as 16 multiplications.
    """
    T, o = outer.deltas[0].shape[2:]
    R, i = outer.rank, outer.inputs_BGTi.shape[-1]
    return T * (T * (i + R * o) + R * o) >= R * o * i * (T + 16)


def _output_sums(outer: Outer) -> Tensor:
    """Compute Σ_r Σ_i (Σ_t δ_to a_ti)² = Σ_r Σ_tu δ_to (a_t·a_u) δ_uo without forming rows: (B, G o)."""
    _, G, T, o = outer.deltas[0].shape
    sums = []
    for _, _, part in blocks(outer, G * T * (T + o), cached_elements(outer.inputs_BGTi.device)):
        products_BGTT = part.inputs_BGTi @ part.inputs_BGTi.mT
        sums_BGo = part.new_zeros(part.n_examples, G, o).double()
        for deltas_BGTo in part.deltas:
            sums_BGo += ((products_BGTT @ deltas_BGTo) * deltas_BGTo).sum(2, dtype=torch.float64)
        # where the positions of a unit cancel, rounding could make the sum negative
        sums.append(sums_BGo.clamp_min_(0).flatten(1))
    return torch.cat(sums)


def norms_of(values: Tensor) -> Tensor:
    """Compute the norms along the last axis in float64. Entries are squares, which would underflow in float32."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=-1, dtype=torch.float64)
    return norms


def diagonal_blocks(part: Contribution) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, diagonals (b, x)) for blocks of examples, in the dtype of the rows.

    Only one row of each example is formed at a time.
    """
    n_entries = math.prod(part.shape)
    for start, stop, block in blocks(part, n_entries, cached_elements(part.new_zeros(0).device)):
        if isinstance(block, Outer):
            block = _live(block)
            sides = _one_position(block)
            if sides is not None:
                left_BGx, right_BGx = sides
                yield start, stop, (left_BGx[..., None] * right_BGx[:, :, None]).flatten(1)
                continue
        diagonal_bx = _row(block, 0).square()
        for row in range(1, block.rank):
            values_bx = _row(block, row)
            diagonal_bx.addcmul_(values_bx, values_bx)
        yield start, stop, diagonal_bx


def _row(part: Contribution, row: int) -> Tensor:
    """Form one row of every example: (B, x)."""
    if isinstance(part, Outer):
        left, right = part.deltas[row], part.inputs_BGTi
        if part.inputs_first:
            left, right = right, left
        return (left.mT @ right).flatten(1)
    if isinstance(part, Routed):
        return replace(part, deltas=(part.deltas[row],)).dense().flatten(1)
    if isinstance(part, Rows):
        return Rows(part.deltas_BTRi[:, :, row, None], part.indices_BT, part.shape).dense().flatten(1)
    if isinstance(part, Sum):
        total = _row(part.parts[0], row)
        for other in part.parts[1:]:
            total = total + _row(other, row)
        return total
    return part.dense()[:, row].reshape(part.n_examples, -1)


def _live(outer: Outer) -> Outer:
    """Remove the positions at which the deltas of all examples are zero, such as padding."""
    live_BGT = outer.live_BGT()
    live_T = live_BGT.any(0).any(0)
    if live_T.all():
        return Outer(outer.deltas, outer.inputs_BGTi, outer.shape, outer.inputs_first, live_BGT)
    deltas = tuple(deltas_BGTo[:, :, live_T] for deltas_BGTo in outer.deltas)
    return Outer(deltas, outer.inputs_BGTi[:, :, live_T], outer.shape, outer.inputs_first, live_BGT[:, :, live_T])


def _one_position(outer: Outer) -> tuple[Tensor, Tensor] | None:
    """Return the two factors of the diagonal if every example has at most one live position, else None.

    The diagonal is the outer product of Σ_r δ_r² and a². The factors have the shapes (B, G, rows) and (B, G, columns)
    of the parameter. A last layer that reads one position of a sequence is an example.
    """
    inputs_BGTi = outer.inputs_BGTi
    if inputs_BGTi.shape[2] == 1:
        inputs_BGi = inputs_BGTi[:, :, 0]
    else:
        live_BGT = outer.live_BGT()
        if not live_BGT.shape[2] or bool((live_BGT.sum(2) > 1).any()):
            return None
        inputs_BGi = inputs_BGTi.take_along_dim(live_BGT.int().argmax(2)[..., None, None], 2)[:, :, 0]
    deltas_BGo = torch.stack([deltas_BGTo.square().sum(2) for deltas_BGTo in outer.deltas]).sum(0)
    sides = deltas_BGo, inputs_BGi.square()
    return sides[::-1] if outer.inputs_first else sides


def looked_up(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return the diagonals of the table rows that each example looked up.

    Look-ups of one row by one example are summed before they are squared.

    Returns:
        The example (n,) and the table row (n,) of each distinct look-up, in ascending order, and the diagonal (n, i).
    """
    B, _, R, i = rows.deltas_BTRi.shape
    examples_B1 = torch.arange(B, device=rows.indices_BT.device)[:, None]
    distinct_n, place = (rows.indices_BT + examples_B1 * rows.shape[0]).flatten().unique(return_inverse=True)
    sums_nRi = rows.new_zeros(len(distinct_n), R, i)
    sums_nRi.index_add_(0, place, rows.deltas_BTRi.flatten(0, 1))
    return distinct_n // rows.shape[0], distinct_n % rows.shape[0], sums_nRi.square().sum(1)
