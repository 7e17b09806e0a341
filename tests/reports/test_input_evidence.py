from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from heat_maps import pixels
from npeff.query.tables import RunTables
from npeff.reports import input_evidence
from npeff.reports.input_evidence import InputEvidence, InputReader, Shown
from npeff.reports.pictures import BLUE, Image
from npeff.reports.token_shares import LEVELS, Piece
from npeff.store.tables import rows_to_columns, write_table
from places import place

SQUARE = Shown(None, Image("i0", 4, 4))
KNOWN = {"class": 1, "n_samples": 8, "information": 2.0, "information_se": 0.1, "entropy": 1.0, "entropy_se": 0.1,
         "prediction_stable": 0.5}  # fmt: skip


def write(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    file = path / place(f"tables/{name}.parquet")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(file, name, rows_to_columns(rows, name))


def evidence(
    path: Path, shape: list[int], shown: Shown, of: dict[int, list[dict[str, Any]]]
) -> dict[int, InputEvidence | None]:
    """The evidence of examples with these rows of shares."""
    nothing = {"group": None, "start": None, "stop": None, "token": None}
    rows = [
        nothing | {"example": example, "position": position, "information": 2 * row["share"]} | row
        for example, found in of.items()
        for position, row in enumerate(found)
    ]
    write(path, "inputs", [{"example": example, "shape": shape} | KNOWN for example in of])
    write(path, "input_shares", rows)
    reader = InputReader(RunTables(path), {1: "one"}, dict.fromkeys(of, shown))
    return {example: reader.evidence(example) for example in of}


def test_an_image_has_a_heat_map_in_the_second_colour_without_negative_shares(tmp_path: Path) -> None:
    shares = [{"share": 0.0}] * 14 + [{"share": -0.5}, {"share": 1.5}]
    found = evidence(tmp_path, [4, 4], SQUARE, {3: shares})[3]
    assert found is not None
    assert (found.information, found.explained, found.stable, found.bars) == (2.0, "one", 0.5, [])
    assert found.shares is not None
    shown = pixels(found.shares.heat)
    assert shown.shape == (4, 4, 4)
    assert set(map(tuple, shown[..., :3].reshape(-1, 3).tolist())) == {BLUE}
    assert (shown[3, 3, 3], shown[..., 3].sum()) == (255, 255)


@pytest.mark.parametrize(
    ("shape", "grid"), [([28, 42], (14, 14)), ([4, 6], (4, 6)), ([16], (4, 4)), ([9], (3, 3)), ([2, 2, 4], None)]
)
def test_the_grid_is_that_of_the_positions_and_fine_ones_are_summed(
    tmp_path: Path, shape: list[int], grid: tuple[int, int] | None
) -> None:
    values = np.random.default_rng(0).dirichlet(np.ones(int(np.prod(shape))))
    found = evidence(tmp_path, shape, SQUARE, {3: [{"share": float(value)} for value in values]})[3]
    assert found is not None
    if grid is None:
        assert found.shares is None
        assert [name for name, _ in found.bars] == [f"#{i}" for i in np.argsort(-values)[:5]]
        return
    assert found.shares is not None
    shown = pixels(found.shares.heat)[..., 3]
    assert shown.shape == grid
    height, width = shape if len(shape) == 2 else grid
    summed = values.reshape(grid[0], height // grid[0], grid[1], width // grid[1]).sum((1, 3))
    assert np.abs(shown / 255 - summed / summed.max()).max() < 0.07  # there are nine levels


def test_tokens_are_shaded_in_the_text_or_in_their_order_if_their_places_are_unknown(tmp_path: Path) -> None:
    known = [{"share": 0.8, "token": "a", "start": 0, "stop": 1}, {"share": 0.2, "token": "b", "start": 2, "stop": 3}]
    unknown = [{"share": 0.2, "token": "a"}, {"share": 0.8, "token": "b"}]
    other = [{"share": 1.0, "token": "c"}]
    for rows, pieces in (
        (known, [Piece("a", LEVELS), Piece(" ", 0), Piece("b", round(LEVELS / 4))]),
        (unknown, [Piece("a", round(LEVELS / 4)), Piece("b", LEVELS)]),
    ):
        found = evidence(tmp_path, [2], Shown("a b", None), {3: rows, 5: other})[3]
        assert found is not None
        assert found.shares is not None
        assert (found.shares.pieces, found.bars) == (pieces, [])
        assert found.shares.as_tokens == (rows is unknown)


def test_columns_of_a_table_have_bars_of_the_largest_shares(tmp_path: Path) -> None:
    names = [f"column {i}" for i in range(8)]
    shares = [0.05, 0.4, -0.2, 0.3, 0.1, 0.06, 0.09, 0.2]
    rows = [{"share": share, "token": name} for share, name in zip(shares, names, strict=True)]
    found = evidence(
        tmp_path,
        [8],
        Shown("a row", None),
        {3: rows, 5: rows[:2] + [{"share": 0.0, "token": name} for name in names[2:]]},
    )
    assert found[3] is not None
    assert found[3].shares is None
    assert found[3].bars == [(f"column {i}", shares[i]) for i in (1, 3, 7, 4, 6)]
    assert found[5] is not None
    assert found[5].bars == [("column 1", 0.4), ("column 0", 0.05)]


def test_examples_in_several_parts_are_shown_as_in_one(tmp_path: Path, monkeypatch) -> None:
    rng = np.random.default_rng(0)
    of = {example: [{"share": float(share)} for share in rng.dirichlet(np.ones(16))] for example in range(7)}
    expected = evidence(tmp_path, [4, 4], SQUARE, of)
    monkeypatch.setattr(input_evidence, "_MOST_ROWS", 40)
    assert evidence(tmp_path, [4, 4], SQUARE, of) == expected


def test_only_rows_of_the_shown_examples_are_read(tmp_path: Path, monkeypatch) -> None:
    evidence(tmp_path, [4, 4], SQUARE, {example: [{"share": 1 / 16}] * 16 for example in range(50)})
    read, rows = RunTables.read, {}

    def noted(tables: RunTables, name: str, *arguments: Any) -> Any:
        found = read(tables, name, *arguments)
        rows[name] = rows.get(name, 0) + len(found)
        return found

    monkeypatch.setattr(RunTables, "read", noted)
    reader = InputReader(RunTables(tmp_path), {}, {4: SQUARE, 40: SQUARE, 60: SQUARE})
    assert rows == {"inputs": 2, "input_shares": 32}
    assert reader.evidence(40) is not None
    assert reader.evidence(60) is None


def test_an_example_that_is_not_finite_has_no_shares(tmp_path: Path) -> None:
    unknown = dict.fromkeys(("information", "information_se", "entropy", "entropy_se", "prediction_stable"))
    write(tmp_path, "inputs", [KNOWN | unknown | {"example": 3, "class": 7, "shape": [4, 4]}])
    write(tmp_path, "input_shares", [])
    found = InputReader(RunTables(tmp_path), {}, {3: SQUARE}).evidence(3)
    assert found == InputEvidence(None, None, "7", None, None, [])


def test_without_the_stage_there_is_no_evidence(tmp_path: Path) -> None:
    assert InputReader(RunTables(tmp_path), {}, {3: SQUARE}).evidence(3) is None
