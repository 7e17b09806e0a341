"""Conditions on the examples: every column can be named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from places import place

NAMES = (
    *("my column", 'says "x"', "it's", "order", "select", "Größe", "ΟΔΟΣ", "数", "CamelCase", "a.b", "examples"),
    *("--", ";", "%", "columns(", "classes", "Twin", "tWIN", "label_name", "x\ny", "count(*)", "🙂", "rowid"),
)


@pytest.fixture(scope="module")
def store(run, tmp_path_factory: pytest.TempPathFactory) -> ComponentStore:
    """The run with further columns: column i is 1 for example i, and 0 otherwise."""
    path = tmp_path_factory.mktemp("named") / "digits"
    shutil.copytree(run.path, path)
    _add_columns(path / place("tables/examples.parquet"))
    return ComponentStore.open(path)


def _add_columns(file: Path) -> None:
    table = pq.read_table(file)
    metadata = table.schema.metadata
    for position, name in enumerate(NAMES):
        table = table.append_column(name, pa.array((np.arange(len(table)) == position).astype(int)))
    pq.write_table(table.replace_schema_metadata(metadata), file)


def found(store: ComponentStore, condition: str) -> list[int]:
    return np.flatnonzero(store.examples_where(condition)).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_every_column_can_be_named(store: ComponentStore, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    assert found(store, f"{quoted} = 1") == [NAMES.index(name)]
    assert found(store, f"examples.{quoted} = 1 and label >= 0") == [NAMES.index(name)]


@pytest.mark.parametrize(("written", "name"), [("camelcase", "CamelCase"), ("MY COLUMN", "my column"), ("A.B", "a.b")])
def test_the_case_of_a_name_does_not_matter(store: ComponentStore, written: str, name: str) -> None:
    assert found(store, f'"{written}" = 1') == [NAMES.index(name)]


@pytest.mark.parametrize("condition", ["twin = 1", "Twin = tWIN"])
def test_names_that_differ_in_case_only_are_not_confused(store: ComponentStore, condition: str) -> None:
    with pytest.raises(QueryError, match="Twin and tWIN of the examples differ in case only"):
        store.examples_where(condition)


def test_a_subquery_reads_all_examples(store: ComponentStore) -> None:
    same = 'example in (select example from examples where "my column" = 1 or label = 7)'
    assert found(store, same) == found(store, '"my column" = 1 or label = 7')
    assert found(store, "ink = (select max(ink) from examples)") == [int(np.argmax(store.table("examples")["ink"]))]


def test_an_own_column_takes_the_place_of_the_name_of_a_class(store: ComponentStore) -> None:
    names = store.top_examples(0, n=5).column_names
    assert names.count("label_name") == 1
