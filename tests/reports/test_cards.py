from __future__ import annotations

import numpy as np
import pytest
from npeff.query.components import ComponentStore
from npeff.reports.cards import PARAMETERS_SHOWN, Bar, CardWriter, bars


@pytest.fixture(scope="module")
def store(run) -> ComponentStore:
    return ComponentStore.open(run.path)


@pytest.fixture(scope="module")
def cards(store: ComponentStore) -> CardWriter:
    return CardWriter(store, 24)


def test_a_card_lists_top_examples_of_each_split_in_order(cards: CardWriter, store: ComponentStore) -> None:
    card = cards.card(2)
    for split, listed in (("held_out", card.held_out), ("fit", card.fit)):
        expected = store.top_examples(2, 24, split)
        assert [example.example for example in listed] == expected["example"].to_pylist()
        assert [example.wrong for example in listed] == [not c for c in expected["correct"].to_pylist()]
        assert all(example.image is not None and example.image.pixelated for example in listed)
    assert max(example.relative for example in card.examples) == 1.0


def test_the_mix_is_counted_over_the_top_examples_and_the_base_rate_over_all_valid_ones(
    cards: CardWriter, store: ComponentStore, run
) -> None:
    examples = store.table("examples")
    labels, predictions = examples["label"].to_numpy(), examples["prediction"].to_numpy()
    top = store.table("top_examples")
    chosen = top["example"].to_numpy()[top["component"].to_numpy() == 1]
    card = cards.card(1)
    assert card.n_top == len(chosen)
    for digit, share in enumerate(card.mix):
        assert share.name == str(digit)
        assert share.label == np.mean(labels[chosen] == digit)
        assert share.prediction == np.mean(predictions[chosen] == digit)
        assert share.label_base == np.mean(labels[run.valid] == digit)
        assert share.prediction_base == np.mean(predictions[run.valid] == digit)
    assert card.accuracy == np.mean((labels == predictions)[chosen])


def test_an_unused_component_has_an_empty_card(cards: CardWriter) -> None:
    card = cards.card(11)
    assert card.examples == []
    assert card.verdicts == []
    assert card.accuracy is None
    assert card.passed == (0, 0)


def test_a_card_counts_the_rows_of_the_informative_sign_above_all_controls(cards: CardWriter) -> None:
    assert cards.card(3).passed == (0, 2)
    assert [(v.examples, v.sign) for v in cards.card(0).verdicts] == [
        ("held_out", 1), ("held_out", -1), ("fit", 1), ("fit", -1)
    ]  # fmt: skip


def test_many_parameters_keep_the_largest_in_their_order_and_the_sum() -> None:
    rng = np.random.default_rng(0)
    energies = rng.dirichlet(np.ones(50))
    found = bars({"parameter": f"layer{i}", "energy": float(e)} for i, e in enumerate(energies))
    assert len(found) == PARAMETERS_SHOWN
    assert sum(bar.energy for bar in found) == pytest.approx(1.0)
    kept = np.sort(np.argsort(-energies)[: PARAMETERS_SHOWN - 1])
    assert [bar.name for bar in found] == [*(f"layer{i}" for i in kept), "39 other parameters"]
    assert bars([{"parameter": "only", "energy": 1.0}]) == [Bar("only", 1.0)]


def test_contrast_examples_have_the_top_examples_prediction_and_no_part_in_the_component(
    cards: CardWriter, run
) -> None:
    contrasted = [card for card in cards.cards() if card.contrast]
    assert contrasted
    for card in contrasted:
        assert card.top_prediction is not None
        assert {example.prediction for example in card.contrast} == {card.top_prediction.name}
        largest = max(example.coefficient for example in card.examples)
        assert all(run.coefficients[e.example, card.component] <= 0.01 * largest for e in card.contrast)
        assert all(example.alike is not None and 0 < example.alike <= 1.001 for example in card.contrast)


def test_a_card_says_which_others_its_direction_moves(cards: CardWriter) -> None:
    plus, minus = cards.card(1).selectivity
    assert (plus.sign, plus.own, plus.most_moved[0]) == (1, 0.1, (2, 0.08))
    assert (minus.sign, minus.median_other) == (-1, 0.001)
