"""The positions of the inputs of each example, with their tokens, names and groups, and the shares of the information.

Legend: B examples of a batch, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from npeff.tasks import Inputs, Token


@dataclass(frozen=True)
class Position:
    """A position that is an input of an example."""

    column: int
    """Number of the position in the batch, with padding."""
    number: int
    """Number of the position in the example, without padding."""
    token: Token
    group: str | None


@dataclass(frozen=True)
class Positions:
    """The positions of one example."""

    shape: tuple[int, ...]
    """Shape of all positions of the example, without padding, such as (8, 8) for pixels."""
    used: Sequence[Position]


def positions_of(inputs: Inputs, tokens: Sequence[Sequence[Token]] | None) -> list[Positions]:
    """Return the positions of each example of a batch.

    Args:
        inputs: The inputs of the batch.
        tokens: The tokens of each example, which are at the positions that are not padding, in order; None if the
            positions are not tokens.
    """
    values = inputs.values
    axes = range(1, values.dim()) if inputs.positions is None else inputs.positions
    grid = tuple(values.shape[axis] for axis in axes)
    n_positions = math.prod(grid)
    names = [Token(name) for name in inputs.names] or [Token(None)] * n_positions
    found = []
    for row in range(len(values)):
        present, mask = (_row(rows, row, n_positions) for rows in (inputs.present, inputs.mask))
        groups = _groups(inputs, row, n_positions)
        columns = [column for column in range(n_positions) if present[column]]
        used = []
        for number, column in enumerate(columns):
            token = names[column] if tokens is None else tokens[row][number]
            if mask[column]:
                used.append(Position(column, number, token, groups[column]))
        found.append(Positions((len(columns),) if inputs.exchangeable else grid, used))
    return found


def _row(rows: Tensor | None, row: int, n_positions: int) -> list[bool]:
    return [True] * n_positions if rows is None else rows[row].tolist()


def _groups(inputs: Inputs, row: int, n_positions: int) -> list[str | None]:
    """Return the name of the group of each position."""
    if inputs.group_of is None:
        return [None] * n_positions
    numbers = inputs.group_of if inputs.group_of.dim() == 1 else inputs.group_of[row]
    return [None if number < 0 else inputs.groups[number] for number in numbers.tolist()]


def share_rows(example: int, positions: Positions, information_P: Tensor) -> list[dict[str, Any]]:
    """Return the rows of the table `input_shares` for an example. There are none if the information is not finite.

    Args:
        example: The number of the example.
        positions: Its positions.
        information_P: The information at each position of the batch, in nats.
    """
    values = information_P[[position.column for position in positions.used]]
    if not bool(values.isfinite().all()):
        return []
    total = float(values.sum())
    return [
        {
            "example": example,
            "position": position.number,
            "group": position.group,
            "start": position.token.start,
            "stop": position.token.stop,
            "token": position.token.text,
            "share": value / total if total else None,
            "information": value,
        }
        for position, value in zip(positions.used, values.tolist(), strict=True)
    ]


def group_rows(example: int, shares: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the table `input_groups` for the shares of an example, in the order of the positions."""
    sums: dict[str, float] = {}
    for row in shares:
        if row["group"] is not None:
            sums[row["group"]] = sums.get(row["group"], 0.0) + row["information"]
    total = sum(row["information"] for row in shares)
    return [
        {"example": example, "group": group, "information": value, "share": value / total if total else None}
        for group, value in sums.items()
    ]
