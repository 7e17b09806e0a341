"""What the pages show: the histogram, the map, the order of the table, and the state of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from npeff.live.component_map import HEIGHT, METHODS, WIDTH, component_map, examples_similarity, placed
from npeff.live.histogram import histogram
from npeff.live.overview import chosen, columns, common_prefix
from npeff.live.pages import View
from npeff.live.snapshot import Snapshot
from npeff.live.workspace import Workspace
from npeff.query.components import ComponentStore
from npeff.store.annotations import Annotation, write_annotations


@pytest.fixture(scope="module")
def snapshot(run) -> Snapshot:
    return Snapshot(ComponentStore.open(run.path), "", 4)


def test_a_histogram_counts_every_positive_coefficient_once() -> None:
    values = np.random.default_rng(0).gamma(0.5, 2.0, 1000)
    found = histogram(values, 5000)
    assert found is not None
    assert sum(bar.n for bar in found.bars) == found.n_active == 1000
    assert [bar.n for bar in found.bars] == [
        int(((values >= bar.low) & ((values < bar.high) | (bar.high == found.bars[-1].high))).sum())
        for bar in found.bars
    ]
    assert all(bar.height > 0 for bar in found.bars), "a bar of one example is visible"
    assert histogram(np.empty(0), 7) is None


def test_the_similarity_of_examples_is_the_cosine_of_the_columns(run) -> None:
    found_KK = examples_similarity(run.coefficients)
    w_NK = np.nan_to_num(run.coefficients).astype(float)
    for i, j in ((0, 1), (3, 3), (2, 7)):
        expected = w_NK[:, i] @ w_NK[:, j] / np.linalg.norm(w_NK[:, i]) / np.linalg.norm(w_NK[:, j])
        assert found_KK[i, j] == pytest.approx(expected, rel=1e-5)
    assert not found_KK[-1].any(), "a dead component is like no other"


@pytest.mark.parametrize("method", METHODS)
def test_similar_components_are_near_each_other_on_the_map(method: str) -> None:
    """Of two groups of components, every component is nearer to its own group."""
    group = np.repeat([0, 1], 8)
    similarity = np.where(group[:, None] == group, 0.9, 0.05) + 0.1 * np.eye(16)
    places = placed(similarity, method)
    distances = np.linalg.norm(places[:, None] - places, axis=-1)
    assert distances[group[:, None] == group].max() < distances[group[:, None] != group].min()


def test_a_map_is_drawn_inside_its_square_whatever_is_found(snapshot: Snapshot) -> None:
    places, cards = snapshot.places("directions", "pca"), snapshot.cards
    whole = component_map(places, cards, [""] * 12)
    everything = whole.points
    assert HEIGHT == whole.height <= whole.width <= WIDTH
    assert component_map(places * [9, 1], cards, [""] * 12).width == WIDTH
    assert component_map(places, [], []).points == []  # a search without a result
    some = component_map(places, cards[3:5], ["", ""]).points
    assert {(point.component, point.x, point.y) for point in some} < {(p.component, p.x, p.y) for p in everything}
    assert all(point.x - point.radius >= 0 and point.x + point.radius <= whole.width for point in everything)
    assert all(point.y - point.radius >= 0 and point.y + point.radius <= HEIGHT for point in everything)


def test_numbers_on_the_map_cover_neither_each_other_nor_other_points(snapshot: Snapshot) -> None:
    """Numbers of 12 components that are all in one place, or in two rows."""
    cards = snapshot.cards
    crowded = component_map(np.zeros((12, 2)), cards, [""] * 12).points
    assert sum(point.number is not None for point in crowded) <= 4
    rows = np.stack([np.arange(12) % 6, np.arange(12) // 6 * 0.2], axis=1)
    spread = component_map(rows, cards, [""] * 12).points
    assert all(point.number is not None for point in spread)
    width = {"middle": (-0.5, 0.5), "start": (0, 1), "end": (-1, 0)}
    boxes = [
        [place.x + 7 * len(str(point.component)) * side for side in width[place.anchor]] + [place.y - 9, place.y]
        for point in spread
        if (place := point.number) is not None
    ]
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = one[0] >= other[1] or other[0] >= one[1] or one[2] >= other[3] or other[2] >= one[3]
            assert apart, (one, other)


def test_the_common_beginning_of_the_parameters_is_left_out_but_for_two_parts() -> None:
    def prefix(*names: str) -> str:
        cards = [SimpleNamespace(top_parameter=SimpleNamespace(name=name)) for name in names]
        return common_prefix(SimpleNamespace(cards=[*cards, SimpleNamespace(top_parameter=None)]))  # type: ignore[arg-type]

    assert prefix("model.encoder.0.weight", "model.encoder.1.weight", "model.encoder.0.bias") == "model.encoder."
    assert prefix("model.layer1.weight", "model.layer2.weight") == "model."
    assert prefix("a.b.c.weight", "a.b.c.weight") == "a.b."
    assert prefix("a.weight", "b.weight") == prefix("weight") == prefix() == ""


def test_the_table_is_sorted_with_missing_values_last(snapshot: Snapshot) -> None:
    for column in columns(snapshot):
        for order in ("up", "down"):
            cards = chosen(snapshot, "", column, order)
            assert sorted(card.component for card in cards) == list(range(12))
            values = [column.value(card) for card in cards]
            missing = [v is None or v == "" or (isinstance(v, float) and math.isnan(v)) for v in values]
            assert missing == sorted(missing)
            known = [v for v, gone in zip(values, missing, strict=True) if not gone]
            assert known == sorted(known, reverse=order == "down"), column.key


def test_a_search_finds_the_cards_with_all_words(snapshot: Snapshot) -> None:
    card = snapshot.cards[5]
    column = columns(snapshot)[0]
    found = chosen(snapshot, f"{card.held_out[0].id.upper()} head.w", column, "up")
    assert card in found
    assert all(card.held_out[0].id in snapshot.words[each.component] for each in found)
    assert chosen(snapshot, "no such words", column, "up") == []


@pytest.mark.parametrize("kept", [True, False], ids=["in memory", "in the store"])
def test_the_nearest_examples_are_those_of_the_store(run, monkeypatch: pytest.MonkeyPatch, kept: bool) -> None:
    if not kept:
        monkeypatch.setattr("npeff.live.snapshot._MOST_KEPT", 1)
    store = ComponentStore.open(run.path)
    found = Snapshot(store, "", 4)
    for number in (0, 3, 100):
        expected = store.neighbours(number, 12)
        by_row, given = found.nearest(None, 12, number), found.nearest(run.coefficients[number], 13)
        np.testing.assert_allclose(by_row["cosine"], expected["cosine"], rtol=1e-5)
        assert set(by_row["example"].to_pylist()[:6]) <= set(expected["example"].to_pylist())
        assert given["example"][0].as_py() == number, "the example itself is the nearest to its coefficients"
        np.testing.assert_allclose(given["cosine"].to_pylist()[1:], expected["cosine"], rtol=1e-5)


def test_the_cards_are_read_again_only_if_the_run_has_changed(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    workspace = Workspace(View(str(path), None, 4), "key")
    with workspace.now() as first:
        mix = first.cards[1].mix
    write_annotations(ComponentStore.open(path).run, {1: Annotation("round", None)})
    with workspace.now() as named:
        assert named.cards[1].annotation.name == "round"
        assert named.cards[1].mix is mix, "a name does not need other data"
        assert {row["name"] for card in named.cards for row in card.neighbours} == {"round", None}
    (path / "provenance.json").write_text('{"task": "another task"}')
    with workspace.now() as changed:
        assert changed.cards[1].mix is not mix
        assert changed.cards[1].annotation.name == "round"
