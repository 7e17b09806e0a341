from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heat_maps import pixels
from npeff.query.tables import RunTables
from npeff.reports.report import write_report
from npeff.reports.token_shares import LEVELS, Piece, ShareReader, shaded_text
from npeff.store.schemas import SCHEMAS
from npeff.store.tables import write_table
from places import place


def reader(path: Path, **columns: list) -> ShareReader:
    (path / place("tables/position_shares.parquet")).parent.mkdir(parents=True)
    n = len(columns["share"])
    defaults: dict[str, list] = {"component": [0] * n, "example": [4] * n, "position": list(range(n)),
                                 "start": [None] * n, "stop": [None] * n, "token": [None] * n}  # fmt: skip
    pq.write_table(pa.table(defaults | columns), path / place("tables/position_shares.parquet"))
    return ShareReader(RunTables(path), [4])


def opacity(uri: str | None) -> np.ndarray:
    return pixels(uri)[:, :, 3] / 255


def test_a_shaded_text_is_the_text() -> None:
    text = "not very good at all"
    pieces = shaded_text(text, [(0, 3, 2), (4, 8, 2), (9, 13, 8), (None, None, 5), (14, 14, 3)])
    assert pieces == [
        Piece("not", 2),
        Piece(" ", 0),
        Piece("very", 2),
        Piece(" ", 0),
        Piece("good", 8),
        Piece(" at all", 0),
    ]
    assert shaded_text(text, [(None, None, 3)]) is None
    assert shaded_text(text, [(0, 99, 3)]) is None
    assert shaded_text("", [(0, 0, 3)]) is None


def test_shades_are_relative_to_the_largest_share_and_none_below_zero(tmp_path: Path) -> None:
    found = reader(tmp_path, share=[0.1, 0.4, -0.3], start=[0, 2, 4], stop=[1, 3, 5], token=["a", "b", "c"])
    shares = found.shares(0, 4, "a b c", None)
    assert shares is not None
    assert shares.pieces == [Piece("a", round(LEVELS / 4)), Piece(" ", 0), Piece("b", LEVELS), Piece(" c", 0)]
    assert shares.strongest == [("b", 0.4), ("a", 0.1)]
    assert found.shares(1, 4, "a b c", None) is None


def test_tokens_without_places_are_listed_in_order(tmp_path: Path) -> None:
    shares = reader(tmp_path, share=[0.2, 0.8, 0.0], position=[1, 0, 2], token=["b", "a", None]).shares(
        0, 4, "a b", None
    )
    assert shares is not None
    assert shares.as_tokens
    assert shares.pieces == [Piece("a", LEVELS), Piece("b", round(LEVELS / 4)), Piece("#2", 0)]


@pytest.mark.parametrize(
    ("n_positions", "size", "grid"), [(12, (3, 4), (3, 4)), (16, (20, 20), (4, 4)), (17, (20, 20), (4, 4))]
)
def test_heat_maps_are_of_pixels_or_a_square_grid_perhaps_after_a_class_token(
    tmp_path: Path, n_positions: int, size: tuple[int, int], grid: tuple[int, int]
) -> None:
    share = [0.0] * n_positions
    share[-1] = 1.0
    shares = reader(tmp_path, share=share).shares(0, 4, None, size)
    assert shares is not None
    seen = opacity(shares.heat)
    assert seen.shape == grid
    assert seen[-1, -1] == 1
    assert seen.sum() == 1


def test_positions_that_are_no_grid_have_no_heat_map_and_fine_ones_are_summed(tmp_path: Path) -> None:
    shares = reader(tmp_path, share=[0.5] * 7).shares(0, 4, None, (20, 20))
    assert shares is not None
    assert shares.heat is None
    (tmp_path / "fine").mkdir()
    fine = reader(tmp_path / "fine", share=[1.0] * (40 * 40)).shares(0, 4, None, (40, 40))
    assert fine is not None
    assert max(opacity(fine.heat).shape) <= 14


def test_a_table_without_rows_as_of_a_task_without_tokens_shows_nothing(tmp_path: Path, make_run: Callable) -> None:
    assert reader(tmp_path, share=[]).shares(0, 4, "a text", None) is None
    run = make_run(n_components=3)
    empty = SCHEMAS["position_shares"].empty_table()
    write_table(run.path / place("tables/position_shares.parquet"), "position_shares", empty)
    page = write_report(run.path).read_text("utf-8")
    assert "Show shares on the images" not in page
    assert "where</b> the coefficient comes from" not in page


def test_a_report_shades_texts_and_overlays_images(make_run: Callable) -> None:
    page = write_report(make_run(n_components=3, text_instead_of_images=True, shares=True).path).read_text("utf-8")
    assert page.count("<b class=s6>written</b>") > 40
    assert '<span class="text tokens"><b class=s' in page
    assert "Show shares on the images" not in page
