"""Shares of the positions of an example, as shaded text or as a heat map of an image.

The table `position_shares` has a row per component, example and position: the `share` of the evidence and, for texts,
the `token` with its characters `start` to `stop` of the example's text if these are known. The table `input_shares` has
the same columns, without the component (`npeff.reports.input_evidence`). Shares are shown relative to the largest share
of the example. Negative shares (a position that opposes the others) are shown as zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.query.tables import RunTables
from npeff.reports.pictures import ORANGE, Colour, heat_map

LEVELS = 6
_STRONGEST = 3
_FINEST_GRID = 14


@dataclass(frozen=True)
class Piece:
    """Part of a text, or a token, with its shade from 0 to `LEVELS`."""

    text: str
    level: int


@dataclass(frozen=True)
class Shares:
    """The display of the position shares of one example."""

    pieces: list[Piece]
    as_tokens: bool
    """The pieces are tokens, not consecutive parts of the example's text."""
    strongest: list[tuple[str, float]]
    heat: str | None
    """Heat map as a data URI, drawn over the image of the example."""


class ShareReader:
    """Reader of the position shares of some examples. There are none if the run has no table `position_shares`."""

    def __init__(self, tables: RunTables, examples: Sequence[int]) -> None:
        self._slices: dict[tuple[int, int], tuple[int, int]] = {}
        if not tables.has("position_shares"):
            return
        table = tables.read("position_shares", None, pc.field("example").isin(list(examples)))
        keys = [(name, "ascending") for name in ("component", "example", "position")]
        self._table: pa.Table = table.sort_by(keys).combine_chunks()
        components, of = self._table["component"].to_numpy(), self._table["example"].to_numpy()
        changes = (np.diff(components) != 0) | (np.diff(of) != 0)
        starts = [0, *(np.flatnonzero(changes) + 1).tolist()] if len(of) else []
        for start, stop in pairwise([*starts, len(of)]):
            self._slices[int(components[start]), int(of[start])] = (start, stop)
        self._n_positions = int(self._table["position"].to_numpy().max(initial=-1)) + 1

    def shares(self, component: int, example: int, text: str | None, shape: tuple[int, int] | None) -> Shares | None:
        """Return the position shares of one example, or None.

        Args:
            component: The component.
            example: The example.
            text: The text of the example, for the shades.
            shape: Height and width of the image of the example, for the heat map.
        """
        where = self._slices.get((component, example))
        if where is None:
            return None
        rows = self._table.slice(where[0], where[1] - where[0])
        if shape is not None:
            return Shares([], False, [], shaded_image(rows, grid_of(self._n_positions, shape), ORANGE))
        return shaded_tokens(rows, text)


def shaded_tokens(rows: pa.Table, text: str | None) -> Shares:
    """Return the shades of a text, or of a list of its tokens if their places are unknown.

    Args:
        rows: The shares of one example: position, start, stop, token and share.
        text: The text of the example.
    """
    levels = _levels(_shares_of(rows))
    strongest = largest_shares(rows, _STRONGEST)
    spans = list(zip(rows["start"].to_pylist(), rows["stop"].to_pylist(), levels, strict=True))
    pieces = None if text is None else shaded_text(text, spans)
    if pieces is not None:
        return Shares(pieces, False, strongest, None)
    return Shares([Piece(*pair) for pair in zip(_names(rows), levels, strict=True)], True, strongest, None)


def largest_shares(rows: pa.Table, count: int) -> list[tuple[str, float]]:
    """Return the tokens with the largest positive shares of one example, and their shares, largest first."""
    shares, names = _shares_of(rows), _names(rows)
    order = np.argsort(-shares, kind="stable")[:count]
    return [(names[i], float(shares[i])) for i in order.tolist() if shares[i] > 0]


def _shares_of(rows: pa.Table) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = np.nan_to_num(rows["share"].to_numpy().astype(float))
    return shares


def _names(rows: pa.Table) -> list[str]:
    positions = rows["position"].to_pylist()
    tokens = rows["token"].to_pylist()
    return [f"#{position}" if token is None else token for token, position in zip(tokens, positions, strict=True)]


def shaded_text(text: str, spans: Sequence[tuple[int | None, int | None, int]]) -> list[Piece] | None:
    """Return the text in pieces of equal shade; None if no span has known characters."""
    known = [(start, stop, level) for start, stop, level in spans if start is not None and stop is not None]
    shades = np.zeros(len(text), np.int64)
    for start, stop, level in known:
        if not 0 <= start <= stop <= len(text):
            return None
        shades[start:stop] = np.maximum(shades[start:stop], level)
    if not known or not text:
        return None
    cuts = [0, *(np.flatnonzero(np.diff(shades)) + 1).tolist(), len(text)]
    return [Piece(text[a:b], int(shades[a])) for a, b in pairwise(cuts)]


def _levels(shares: NDArray[np.float64]) -> list[int]:
    largest = shares.max(initial=0.0)
    if largest <= 0:
        return [0] * len(shares)
    result: list[int] = np.rint(LEVELS * np.clip(shares / largest, 0, 1)).astype(int).tolist()
    return result


@dataclass(frozen=True)
class Grid:
    """Positions in rows and columns, in row-major order."""

    height: int
    width: int
    first: int = 0
    """The position in the first row and column. Earlier positions are not in the grid."""


def grid_of(n_positions: int, shape: tuple[int, int]) -> Grid | None:
    """Return the grid of the positions of an image, or None.

    The positions are the pixels of the image or a square grid of patches, which may follow one position that is not in
    the image, such as a class token.

    Args:
        n_positions: The number of positions.
        shape: Height and width of the image.
    """
    height, width = shape
    if n_positions == height * width:
        return Grid(height, width)
    for first in (0, 1):
        side = math.isqrt(max(n_positions - first, 0))
        if side * side == n_positions - first and (side > 1 or not first):
            return Grid(side, side, first)
    return None


def shaded_image(rows: pa.Table, grid: Grid | None, colour: Colour) -> str | None:
    """Return the heat map of the shares of one example; None if they have no grid."""
    if grid is None:
        return None
    values = np.zeros(grid.height * grid.width)
    places, shares = rows["position"].to_numpy() - grid.first, _shares_of(rows)
    values[places[places >= 0]] = shares[places >= 0]
    return heat_map(_coarser(values.reshape(grid.height, grid.width)), colour)


def _coarser(grid_HW: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over blocks, so that no side has more than 14 cells. A finer map is not visible and increases the file."""
    for axis in (0, 1):
        step = math.ceil(grid_HW.shape[axis] / _FINEST_GRID)
        if step > 1:
            grid_HW = np.add.reduceat(grid_HW, np.arange(0, grid_HW.shape[axis], step), axis=axis)
    return grid_HW
