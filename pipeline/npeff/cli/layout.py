"""Tables for people: as many columns as fit a terminal, one line for each column, or one line for each value."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from npeff.errors import printable

if TYPE_CHECKING:
    from rich.table import Table

_LONGEST = 80
"""Number of characters after which a cell is cut."""
_NARROWEST = 24
"""Least width of a column of longer texts. Such a column is shown before others, because it says what a row is."""
_IMPORTANT = (
    *("name", "label_name", "prediction_name", "correct"),
    *("kl_ratio_matched_held_out", "best_control_held_out", "matched_held_out"),
)
"""Columns that are shown before those on their left, if not all columns fit."""
_FRAME, _PADDED = 1, 3
"""Width of the frame of a table, and of the frame and the padding of a column."""

Cells = Mapping[str, Sequence[str]]
"""The texts of a table by column."""


def rows_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table for `rich.console.Console.print`, whose cells show texts as they are, without markup."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in columns:
        table.add_column(Text(printable(name)))
    for row in rows:
        table.add_row(*(Text(printable(text)) for text in row))
    return table


def print_fitted(table: Any, stream: TextIO) -> None:
    """Print the columns of a pyarrow.Table that are not empty, as they fit the terminal.

    If not all of them fit and the rows fit side by side, each column is a line. Otherwise, texts are cut, and columns
    are left out that a last line names. If ``stream`` is no terminal, everything is printed.
    """
    from rich.console import Console

    cells = {name: [_cell(value) for value in table[name].to_pylist()] for name in _filled(table)}
    room = Console().width if stream.isatty() else sys.maxsize
    headings, rows = list(cells), list(zip(*cells.values(), strict=True))
    left_out: list[str] = []
    if _width(map(len, _longest(cells).values())) > room:
        numbers = [str(number) for number in range(1, len(table) + 1)]
        turned = [["column", *numbers], *([name, *column] for name, column in cells.items())]
        if _width(max(map(len, column)) for column in zip(*turned, strict=True)) <= room:
            headings, rows = turned[0], [tuple(line) for line in turned[1:]]
        else:
            widths = _fitting(_longest(cells), room)
            left_out = [name for name in cells if name not in widths]
            headings = list(widths)
            rows = list(zip(*([_cut(text, widths[name]) for text in cells[name]] for name in widths), strict=True))
    shown = rows_table(headings, rows)
    width = None if stream.isatty() else max(20, _width(map(len, _longest(cells).values())))
    Console(file=stream, width=width).print(shown)
    if left_out:
        names = printable(", ".join(left_out))
        print(f"{len(left_out)} of {len(cells)} columns not shown: {names}", file=stream)
        print(
            "They are in --format expanded (a line for each value), csv and json, and on a wider terminal.", file=stream
        )


def print_expanded(table: Any, stream: TextIO) -> None:
    """Print each value of a pyarrow.Table that is not null on a line of its own, with its column, whole."""
    names = [printable(name) for name in table.column_names]
    longest = max(map(len, names), default=0)
    for number, row in enumerate(table.to_pylist(), 1):
        print(f"-[ {number} of {len(table)} ]-", file=stream)
        for name, value in zip(names, row.values(), strict=True):
            if value is not None:
                print(f"{name:{longest}} | {_text(value)}", file=stream)


def _filled(table: Any) -> list[str]:
    return [name for name in table.column_names if table[name].null_count < len(table)] or list(table.column_names)


def _longest(cells: Cells) -> dict[str, str]:
    """Return the longest text of each column, its name included."""
    return {name: max([printable(name), *texts], key=len) for name, texts in cells.items()}


def _width(columns: Iterable[int]) -> int:
    return _FRAME + sum(_PADDED + width for width in columns)


def _fitting(longest: Mapping[str, str], room: int) -> dict[str, int]:
    """Return the widths of the columns to show, in their order.

    The first column is chosen first, then texts, the important columns, and the others from the left.
    """
    needed = {name: len(text) for name, text in longest.items()}
    least = {name: max(len(printable(name)), min(width, _NARROWEST)) for name, width in needed.items()}
    texts = [name for name in needed if least[name] < needed[name]]
    first = next(iter(needed))
    chosen = [first]
    for name in dict.fromkeys([first, *texts, *(name for name in _IMPORTANT if name in needed), *needed]):
        if name != first and _width(least[each] for each in [*chosen, name]) <= room:
            chosen.append(name)
    widths = {name: least[name] for name in needed if name in chosen}
    for name in texts:
        if name in widths:
            widths[name] += min(needed[name] - widths[name], room - _width(widths.values()))
    return widths


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(value: Any) -> str:
    match value:
        case None:
            return ""
        case list():
            return " ".join(_cell(item) for item in value[:4]) + (" …" if len(value) > 4 else "")
        case _:
            return _cut(_text(value), _LONGEST)


def _text(value: Any) -> str:
    match value:
        case float():
            return f"{value:.4g}"
        case bytes():
            return f"{len(value)} bytes"
        case list():
            return " ".join(map(_text, value))
        case _:
            return printable(str(value))
