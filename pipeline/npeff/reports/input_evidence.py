"""What the stage `inputs` found for the examples of the cards: how many nats, and which positions they come from.

The tables `inputs` and `input_shares` may have a row for every example and pixel of a data set. Only the rows of the
examples that the report shows are read, some examples at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from npeff.query.tables import RunTables
from npeff.reports.pictures import BLUE, Image
from npeff.reports.token_shares import Grid, Shares, grid_of, largest_shares, shaded_image, shaded_tokens

BARS_SHOWN = 5
_MOST_ROWS = 1_000_000
"""Largest number of rows of `input_shares` in memory, unless a single example has more."""


@dataclass(frozen=True)
class InputEvidence:
    """The information in the inputs of one example."""

    information: float | None
    """Nats; None if the logits or gradients of the example are not finite."""
    information_se: float | None
    explained: str | None
    """The class whose probability is explained; None for all classes."""
    stable: float | None
    """Fraction of the draws of the noise with the same prediction."""
    shares: Shares | None
    """The shares of the positions as a heat map or as shaded tokens."""
    bars: list[tuple[str, float]]
    """The largest shares, if they are neither an image nor tokens: names of columns, and numbers of positions."""


@dataclass(frozen=True)
class Shown:
    """What a card shows of an example besides its inputs."""

    text: str | None
    image: Image | None


class InputReader:
    """Reader of the information in the inputs of some examples. There is none if the stage `inputs` has not run.

    Args:
        tables: The tables of the run.
        names: The names of the classes.
        examples: The examples that the report shows.
    """

    def __init__(self, tables: RunTables, names: Mapping[int, str], examples: Mapping[int, Shown]) -> None:
        self._found: dict[int, InputEvidence] = {}
        if not tables.has("inputs"):
            return
        columns = ["example", "class", "information", "information_se", "prediction_stable", "shape"]
        rows = _of_examples(tables, "inputs", columns, sorted(examples)).to_pylist()
        shapes = {row["example"]: row["shape"] for row in rows if row["information"] is not None}
        displays = _displays(tables, shapes, examples) if tables.has("input_shares") else {}
        for row in rows:
            shares, bars = displays.get(row["example"], (None, []))
            number = row["class"]
            self._found[row["example"]] = InputEvidence(
                information=row["information"],
                information_se=row["information_se"],
                explained=None if number is None else names.get(number, str(number)),
                stable=row["prediction_stable"],
                shares=shares,
                bars=bars,
            )

    def evidence(self, example: int) -> InputEvidence | None:
        """Return the information in the inputs of an example; None if they are not explained."""
        return self._found.get(example)


_Display = tuple[Shares | None, list[tuple[str, float]]]


def _displays(
    tables: RunTables, shapes: Mapping[int, Sequence[int]], examples: Mapping[int, Shown]
) -> dict[int, _Display]:
    """Return how the shares of each example are shown: as an image or tokens, or as bars."""
    columns = ["example", "position", "start", "stop", "token", "share"]
    found: dict[int, _Display] = {}
    for chosen in _in_parts(shapes):
        table = _of_examples(tables, "input_shares", columns, chosen)
        table = table.sort_by([("example", "ascending"), ("position", "ascending")]).combine_chunks()
        of = table["example"].to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(of)] if len(of) else []
        as_bars = _have_equal_names(table, cuts)
        for start, stop in pairwise(cuts):
            example = int(of[start])
            found[example] = _display(
                table.slice(start, stop - start), shapes[example], examples[example], as_bars=as_bars
            )
    return found


def _display(rows: pa.Table, shape: Sequence[int], shown: Shown, *, as_bars: bool) -> _Display:
    if shown.image is not None:
        picture = shaded_image(rows, _grid(shape, shown.image), BLUE)
        if picture is not None:
            return Shares([], False, [], picture), []
    if as_bars:
        return None, largest_shares(rows, BARS_SHOWN)
    return shaded_tokens(rows, shown.text), []


def _grid(shape: Sequence[int], image: Image) -> Grid | None:
    """Return the grid of the positions: that of their shape or, for a vector of entries, that of the image."""
    if len(shape) == 2:
        return Grid(*shape)
    return grid_of(shape[0], (image.height, image.width)) if len(shape) == 1 else None


def _have_equal_names(table: pa.Table, cuts: Sequence[int]) -> bool:
    """Return whether all examples have the same names of positions, as the columns of a table, and no places in a text.

    Positions without names, such as entries of a vector, also count.
    """
    lengths = {stop - start for start, stop in pairwise(cuts)}
    if len(lengths) != 1 or table["start"].null_count < len(table):
        return False
    names = pc.fill_null(table["token"].combine_chunks().dictionary_encode().indices, -1).to_numpy()
    by_example = names.reshape(-1, lengths.pop())
    return bool((by_example == by_example[0]).all())


def _in_parts(shapes: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
    """Yield the examples in parts with a bounded number of positions."""
    part: list[int] = []
    n_rows = 0
    for example, shape in sorted(shapes.items()):
        n_positions = math.prod(shape)
        if part and n_rows + n_positions > _MOST_ROWS:
            yield part
            part, n_rows = [], 0
        part.append(example)
        n_rows += n_positions
    if part:
        yield part


def _of_examples(tables: RunTables, name: str, columns: Sequence[str], examples: Sequence[int]) -> pa.Table:
    """Read the rows of some examples, which are in ascending order. The bounds skip most row groups."""
    field: Any = pc.field("example")
    if not examples:
        return tables.read(name, columns, field == -1)
    return tables.read(name, columns, field.isin(examples) & (field >= examples[0]) & (field <= examples[-1]))
