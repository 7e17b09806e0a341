"""The report tells what a step does to the predictions."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from npeff.query.components import ComponentStore
from npeff.reports.cards import CardWriter
from npeff.reports.charts import full_width
from npeff.reports.report import write_report
from npeff.reports.shifts import CLASSES_SHOWN, EXAMPLES_SHOWN
from npeff.reports.token_names import token_names
from npeff.store.schemas import SCHEMAS, columns_since
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


def test_a_table_of_version_4_has_no_texts_around_predictions(make_run: Callable) -> None:
    made = make_run(n_components=4)
    file = made.path / place("tables/example_shifts.parquet")
    former = pq.read_table(file).drop_columns(list(columns_since("example_shifts", 4)))
    pq.write_table(former.replace_schema_metadata({"npeff.table": "example_shifts", "npeff.schema_version": "4"}), file)
    effect = CardWriter(ComponentStore.open(made.path), 24).card(1).effects[0]
    assert [row["context"] for row in effect.rows] == [None] * EXAMPLES_SHOWN
    assert 'class="context"' not in write_report(made.path).read_text()


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
    file = made.path / place("tables/example_shifts.parquet")
    rows = [row | {"context": "… said\n<b>&[she]"} for row in pq.read_table(file).to_pylist()]
    write_table(file, "example_shifts", pa.Table.from_pylist(rows, schema=SCHEMAS["example_shifts"]))
    page = write_report(made.path).read_text()
    assert "<q>&lt;she&gt;</q> ↑ <q> he</q> ↓" in page
    assert "most changed prediction of each example" in page
    assert '<span class="context">… said / &lt;b&gt;&amp;[she]</span>' in page
    assert "<b>&[she]" not in page


def test_of_a_vocabulary_the_classes_of_a_card_are_tokens(make_run: Callable) -> None:
    """Texts of the tables of the verification first, then those of the labels; a number if there is none."""
    made = make_run(n_components=4)
    write_table(made.path / place("tables/classes.parquet"), "classes", SCHEMAS["classes"].empty_table())
    file = made.path / place("tables/examples.parquet")
    table = pq.read_table(file)
    assert CardWriter(ComponentStore.open(made.path), 24).card(0).mix[0].name == "0"
    texts = {2: "two", 4: "four", 7: None, 8: "\n", None: None}
    pq.write_table(table.append_column("token", [[texts.get(n, "&") for n in table["label"].to_pylist()]]), file)
    for name, columns in {"prediction_shifts": ["class"], "example_shifts": ["class_before", "class_after"]}.items():
        file = made.path / place(f"tables/{name}.parquet")
        rows = pq.read_table(file).to_pylist()
        for column in columns:
            rows = [row | {column.replace("class", "name"): " 4 " if row[column] == 4 else None} for row in rows]
        write_table(file, name, pa.Table.from_pylist(rows, schema=SCHEMAS[name]))
    store = ComponentStore.open(made.path)
    assert token_names(store.tables) == dict.fromkeys((0, 1, 3, 5, 6, 9), "&") | {2: "two", 4: " 4 ", 8: "⏎"}
    names = [share.name for share in CardWriter(store, 24).card(0).mix]
    assert names == ["&", "&", "two", "&", " 4 ", "&", "&", "7", "⏎", "&"]


def test_bars_of_small_probabilities_have_a_scale_of_their_own(make_run: Callable) -> None:
    made = make_run(n_components=4)
    page = write_report(made.path).read_text()
    assert 'style="--w:60.0;--b:20.0"' in page, "0.3 after and 0.1 before, of a full bar of 0.5"
    assert "full bar: 50%" in page
    file = made.path / place("tables/prediction_shifts.parquet")
    rows = [
        row | {name: row[name] / 1000 for name in ("p_before", "p_after")} for row in pq.read_table(file).to_pylist()
    ]
    write_table(file, "prediction_shifts", pa.Table.from_pylist(rows, schema=SCHEMAS["prediction_shifts"]))
    page = write_report(made.path).read_text()
    assert 'style="--w:60.0;--b:20.0"' in page
    assert "full bar: 0.05%" in page
    assert '<td class="num">0.03%</td>' in page


@pytest.mark.parametrize(
    ("largest", "full"), [(1.0, 1.0), (0.51, 1.0), (0.5, 0.5), (0.21, 0.5), (0.2, 0.2), (0.013, 0.02), (1e-5, 1e-5)]
)
def test_a_full_bar_is_the_next_round_number(largest: float, full: float) -> None:
    assert full_width([0.0, None, largest / 3, largest]) == pytest.approx(full)
    assert full_width([None, 0.0]) == 1
