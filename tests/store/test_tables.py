from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from npeff.storage.errors import StoreError
from npeff.store.schemas import SCHEMAS
from npeff.store.tables import read_table, write_table, write_table_in_parts

_VALUES: dict[pa.DataType, list[Any]] = {
    pa.int64(): [3, -1],
    pa.float64(): [0.5, float("inf")],
    pa.string(): ["fit", "größe"],
    pa.bool_(): [True, False],
    pa.binary(): [b"\x89PNG", b""],
    pa.list_(pa.float32()): [[0.5, 1.0], [2.0]],
    pa.list_(pa.int64()): [[3, 1], []],
}


def columns_of(name: str) -> dict[str, Any]:
    return {field.name: list(_VALUES[field.type]) for field in SCHEMAS[name]}


@pytest.mark.parametrize("name", SCHEMAS)
def test_tables_are_read_as_they_were_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "tables" / f"{name}.parquet"
    columns = columns_of(name)
    write_table(path, name, columns)
    table = read_table(path, name)
    assert table.schema == SCHEMAS[name]
    assert table.to_pydict() == columns
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", SCHEMAS)
def test_null_is_kept_where_it_has_a_meaning_and_refused_elsewhere(tmp_path: Path, name: str) -> None:
    for field in SCHEMAS[name]:
        columns = columns_of(name)
        columns[field.name][1] = None
        path = tmp_path / f"{field.name}.parquet"
        if field.nullable:
            write_table(path, name, columns)
            assert read_table(path, name).to_pydict() == columns
        else:
            with pytest.raises(StoreError, match=f"column {field.name} of table {name} must not be null"):
                write_table(path, name, columns)
            assert not path.exists()


def test_numpy_arrays_are_columns(tmp_path: Path) -> None:
    path = tmp_path / "examples.parquet"
    columns = columns_of("examples")
    logits = np.arange(6, dtype=np.float64).reshape(2, 3)
    arrays = {"example": np.arange(2, dtype=np.int32), "fisher_norm": np.ones(2, np.float32), "logits": logits}
    write_table(path, "examples", {**columns, **arrays, "valid": np.array([True, False])})
    table = read_table(path, "examples")
    assert table["logits"].to_pylist() == logits.tolist()
    assert table["example"].to_pylist() == [0, 1]
    write_table(path, "examples", table.slice(1))
    assert read_table(path, "examples") == table.slice(1)


def test_nan_stays_a_number(tmp_path: Path) -> None:
    path = tmp_path / "components.parquet"
    write_table(path, "components", {**columns_of("components"), "lift_cosine": np.array([np.nan, 1.0])})
    column = read_table(path, "components")["lift_cosine"]
    assert column.null_count == 0
    assert np.isnan(column[0].as_py())


def test_an_empty_table_keeps_its_schema(tmp_path: Path) -> None:
    path = tmp_path / "coefficients.parquet"
    write_table(path, "coefficients", {column: [] for column in SCHEMAS["coefficients"].names})
    assert read_table(path, "coefficients") == SCHEMAS["coefficients"].empty_table()


def test_examples_keep_the_metadata_of_their_task(tmp_path: Path) -> None:
    path = tmp_path / "examples.parquet"
    write_table(path, "examples", {**columns_of("examples"), "writer": ["a", None], "age": [41, 7]})
    table = read_table(path, "examples")
    assert table.column_names == [*SCHEMAS["examples"].names, "writer", "age"]
    assert table["writer"].to_pylist() == ["a", None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": [1, 2]}, r"table classes has no columns \['more'\]"),
        ({"class": ["one", "two"]}, "column class of table classes cannot be stored as int64"),
        ({"class": [0.5, 1.0]}, "column class of table classes cannot be stored as int64"),
        ({"class": ["1", "2"]}, "column class of table classes cannot be stored as int64: it is string"),
        ({"name": [1, 2]}, "column name of table classes cannot be stored as string: it is int64"),
        ({"name": ["a", 1]}, "column name of table classes cannot be stored as string"),
        ({"class": pa.array(["one", "two"])}, "column class of table classes cannot be stored as int64"),
        ({"class": [2**70, 0]}, "column class of table classes cannot be stored as int64"),
        ({"name": ["a"]}, "columns of table classes have different lengths"),
    ],
)
def test_wrong_columns_are_refused_and_the_former_table_kept(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "classes.parquet"
    write_table(path, "classes", columns_of("classes"))
    with pytest.raises(StoreError, match=message) as caught:
        write_table(path, "classes", {**columns_of("classes"), **changes})
    assert "\n" not in str(caught.value)
    assert read_table(path, "classes").to_pydict() == columns_of("classes")


def test_a_missing_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"table classes lacks the columns \['name'\]"):
        write_table(tmp_path / "classes.parquet", "classes", {"class": [1]})


def test_a_missing_table_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"there is no table at .*history\.parquet"):
        read_table(tmp_path / "history.parquet", "history")


@pytest.mark.parametrize("position", [0.3, 0.6, -1])
def test_a_damaged_table_is_found(tmp_path: Path, position: float) -> None:
    path = tmp_path / "coefficients.parquet"
    rows = np.arange(2000)
    write_table(path, "coefficients", {"example": rows, "component": rows, "coefficient": rows / 7})
    content = bytearray(path.read_bytes())
    content[int(position * len(content)) if position >= 0 else -1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=r"coefficients\.parquet is damaged: delete it"):
        read_table(path, "coefficients")


def test_a_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.parquet"
    for table in (pa.table({"class": [1]}), pa.table({"class": [1.0], "name": ["a"]})):
        pq.write_table(table, path)
        with pytest.raises(StoreError, match="does not have the columns of table classes"):
            read_table(path, "classes")


def test_a_table_in_parts_is_the_whole_in_groups_of_an_even_size_that_say_what_they_hold(tmp_path: Path) -> None:
    path, rows = tmp_path / "coefficients.parquet", np.arange(100_000)
    whole = {"example": rows % 977, "component": rows // 4000, "coefficient": rows / 7}
    cuts = [0, 3, 3, 40_000, 40_001, 99_000, 100_000]
    parts = ({name: values[a:b] for name, values in whole.items()} for a, b in itertools.pairwise(cuts))
    write_table_in_parts(path, "coefficients", parts)
    assert read_table(path, "coefficients").equals(pa.table(whole, schema=SCHEMAS["coefficients"]))
    metadata = pq.read_metadata(path)
    assert [metadata.row_group(group).num_rows for group in range(4)] == [32_768, 32_768, 32_768, 1_696]
    assert metadata.row_group(1).column(1).statistics.min == 32_768 // 4000
    assert metadata.metadata[b"npeff.schema_version"] == b"5"
    assert metadata.metadata[b"npeff.table"] == b"coefficients"


def test_examples_are_in_groups_by_their_size_and_some_columns_are_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "examples.parquet"
    columns = {name: values[:1] * 3000 for name, values in columns_of("examples").items()}
    write_table(path, "examples", {**columns, "image": [b"x" * 500] * 3000})
    rows = [pq.read_metadata(path).row_group(group).num_rows for group in range(2)]
    assert 256 <= rows[0] == rows[1] < 600
    assert read_table(path, "examples", ["label", "split"]).to_pydict() == {
        name: columns[name] for name in ("label", "split")
    }


def test_a_part_that_is_wrong_leaves_the_former_table(tmp_path: Path) -> None:
    path = tmp_path / "classes.parquet"
    write_table(path, "classes", columns_of("classes"))
    with pytest.raises(StoreError, match="column name of table classes must not be null"):
        write_table_in_parts(path, "classes", [{"class": [1], "name": ["a"]}, {"class": [2], "name": [None]}])
    assert read_table(path, "classes").to_pydict() == columns_of("classes")
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_table_without_a_version_is_read_and_one_of_a_later_version_refused(tmp_path: Path) -> None:
    path = tmp_path / "classes.parquet"
    table = pa.table({"class": [1], "name": ["a"]}, schema=SCHEMAS["classes"])
    pq.write_table(table, path)
    assert read_table(path, "classes").equals(table)
    pq.write_table(table.replace_schema_metadata({"npeff.schema_version": "6"}), path)
    with pytest.raises(StoreError, match=r"classes\.parquet has schema version 6, but this program"):
        read_table(path, "classes")
