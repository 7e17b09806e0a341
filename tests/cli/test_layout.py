"""Tables on a terminal: which columns are shown, and how to get the others."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout

import pyarrow as pa
import pytest
from npeff.cli.output import OutputFormat, write_answer
from rich.cells import cell_len

WIDE = {f"column_{number:02d}": [number + 0.25, number + 0.5] for number in range(50)}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(table: pa.Table, monkeypatch: pytest.MonkeyPatch, width: int | None, kind: OutputFormat | None = None) -> str:
    """What a terminal of a width shows; what is written to a file or a pipe if it is None."""
    monkeypatch.setenv("COLUMNS", "40" if width is None else str(width))
    stream = io.StringIO() if width is None else Terminal()
    with redirect_stdout(stream):
        write_answer(table, kind, None)
    return re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith(("┃", "│"))]
    return [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in lines]


def widest_frame(text: str) -> int:
    return max(cell_len(line) for line in text.splitlines() if line.startswith(("┏", "│")))


def test_rows_that_fit_side_by_side_are_columns_if_there_are_too_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(pa.table(WIDE), monkeypatch, 60)
    header, *lines = rows_of(text)
    assert header == ["column", "1", "2"]
    assert lines == [[name, *(f"{value:.4g}" for value in values)] for name, values in WIDE.items()]
    assert widest_frame(text) <= 60
    assert "not shown" not in text


def test_other_columns_are_left_out_and_named_with_the_way_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    many = pa.table({name: values * 20 for name, values in WIDE.items()})
    text = shown(many, monkeypatch, 80)
    header, *lines = rows_of(text)
    assert header == list(WIDE)[:6]
    assert len(lines) == 40
    assert widest_frame(text) <= 80
    last = text.splitlines()[-2:]
    assert last[0] == f"44 of 50 columns not shown: {', '.join(list(WIDE)[6:])}"
    assert "--format expanded" in last[1]
    assert rows_of(shown(many, monkeypatch, None))[0] == list(WIDE), "everything goes into a file or a pipe"
    assert all(name in shown(many, monkeypatch, 80, OutputFormat.EXPANDED) for name in WIDE)


@pytest.mark.parametrize("width", [50, 70, 110, 160, 400])
def test_a_column_of_texts_is_cut_and_not_left_out(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    table = pa.table(
        {"rank": list(range(30))}
        | {name: values * 15 for name, values in list(WIDE.items())[:8]}
        | {"kl_ratio_matched_held_out": [1.5] * 30, "text": [f"{number} " + 40 * "word " for number in range(30)]}
    )
    text = shown(table, monkeypatch, width)
    header, *lines = rows_of(text)
    assert (header[0], header[-1]) == ("rank", "text")
    assert ("kl_ratio_matched_held_out" in header) == (width > 60)
    assert [cells[-1][:6] for cells in lines] == [f"{number} word"[:6] for number in range(30)]
    assert max(80 if width == 400 else 24, len(lines[0][-1])) == len(lines[0][-1])
    assert widest_frame(text) <= width


def test_expanded_shows_every_value_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"id": ["a", "b"], "n": [None, 3], "long": ["x" * 200, "\x1b[2J"], "list": [list(range(9))] * 2})
    assert shown(table, monkeypatch, 40, OutputFormat.EXPANDED).splitlines() == [
        "-[ 1 of 2 ]-",
        "id   | a",
        f"long | {'x' * 200}",
        "list | 0 1 2 3 4 5 6 7 8",
        "-[ 2 of 2 ]-",
        "id   | b",
        "n    | 3",
        "long | \\x1b[2J",
        "list | 0 1 2 3 4 5 6 7 8",
    ]
