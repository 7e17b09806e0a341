"""The report tells what a step does to the predictions."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from npeff.query.components import ComponentStore
from npeff.reports.cards import CardWriter
from npeff.reports.report import write_report
from npeff.reports.shifts import CLASSES_SHOWN, EXAMPLES_SHOWN
from npeff.store.schemas import SCHEMAS
from npeff.store.tables import write_table
from places import place


def test_a_card_has_the_effects_on_held_out_examples_the_informative_sign_first(run) -> None:
    card = CardWriter(ComponentStore.open(run.path), 24).card(1)
    assert [(effect.examples, effect.sign, effect.informative) for effect in card.effects] == [
        ("held_out", -1, True), ("held_out", 1, False)
    ]  # fmt: skip
    effect = card.effects[0]
    stored = pq.read_table(run.path / place("tables/example_shifts.parquet")).to_pylist()
    n_top = sum((row["component"], row["examples"], row["sign"]) == (1, "held_out", -1) for row in stored)
    assert [(flip.before, flip.after) for flip in effect.flips] == [("4", "9")]
    assert effect.flips[0].share == pytest.approx(-(-n_top // 4) / n_top)
    assert effect.raised is not None
    assert effect.lowered is not None
    assert (effect.raised["name"], effect.lowered["name"]) == ("9", "4")
    assert [row["name"] for row in effect.classes[:2]] == ["4", "9"]
    assert len(effect.classes) == CLASSES_SHOWN
    assert len(effect.rows) == min(EXAMPLES_SHOWN, n_top)


def test_an_unverified_component_and_a_run_without_the_tables_have_none(make_run: Callable) -> None:
    made = make_run(n_components=4)
    assert CardWriter(ComponentStore.open(made.path), 24).card(3).effects == []
    for name in ("prediction_shifts", "example_shifts"):
        (made.path / place(f"tables/{name}.parquet")).unlink()
    assert CardWriter(ComponentStore.open(made.path), 24).card(0).effects == []
    assert "What a step does" not in write_report(made.path).read_text()


def test_of_a_vocabulary_the_tokens_are_named_in_place_of_the_label(make_run: Callable) -> None:
    made = make_run(n_components=4)
    write_table(made.path / place("tables/classes.parquet"), "classes", SCHEMAS["classes"].empty_table())
    file = made.path / place("tables/examples.parquet")
    table = pq.read_table(file)
    for name in ("label", "prediction", "correct"):
        kind = table.schema.field(name).type
        table = table.set_column(table.column_names.index(name), name, pa.nulls(len(table), kind))
    pq.write_table(table, file)
    file = made.path / place("tables/prediction_shifts.parquet")
    rows = [row | {"name": {4: " he", 9: "<she>"}.get(row["class"])} for row in pq.read_table(file).to_pylist()]
    write_table(file, "prediction_shifts", pa.Table.from_pylist(rows, schema=SCHEMAS["prediction_shifts"]))
    page = write_report(made.path).read_text()
    assert "<q>&lt;she&gt;</q> ↑ <q> he</q> ↓" in page
    assert "most changed prediction of each example" in page
