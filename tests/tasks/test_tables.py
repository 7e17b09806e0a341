"""Reading examples from files, folders and Hugging Face data sets."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from npeff.tasks import TaskError
from npeff.tasks.labels import LabelOptions, class_numbers, distinct_names
from npeff.tasks.tables import TableOptions, example_table, texts

COLUMNS: dict[str, list[Any]] = {
    "key": ["a-1", "b-2", "c-3", "d-4"],
    "text": ["one", "two", 'a "quoted" word', "four"],
    "group": [1, 2, 2, 3],
}


def write_jsonl(path: Path, table: pa.Table) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def write_separated(path: Path, table: pa.Table) -> None:
    quoting = {"delimiter": ","} if path.suffix == ".csv" else {"delimiter": "\t", "quotechar": None, "quoting": 3}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, **quoting)
        writer.writerow(table.column_names)
        writer.writerows(row.values() for row in table.to_pylist())


def write_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


WRITERS: dict[str, Callable[[Path, pa.Table], None]] = {
    "data.parquet": lambda path, table: pq.write_table(table, path),
    "data.csv": write_separated,
    "data.tsv": write_separated,
    "data.txt": write_separated,
    "data.jsonl": write_jsonl,
    "data.feather": lambda path, table: pyarrow.feather.write_feather(table, str(path)),
    "file.arrow": lambda path, table: pyarrow.feather.write_feather(table, str(path), compression="uncompressed"),
    "stream.arrow": write_stream,
}


def read(data: str | Path, needed: tuple[str, ...] = ("text",), **options: Any) -> pa.Table:
    return TableOptions(data=str(data), **options).read(needed)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table(COLUMNS), path)
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, pa.table(COLUMNS))
    assert read(tmp_path / name, id_column="key").to_pydict() == {"id": COLUMNS["key"], **COLUMNS}


def test_ids_are_row_numbers_of_the_data_unless_named(path: Path) -> None:
    assert read(path)["id"].to_pylist() == ["0", "1", "2", "3"]
    assert read(path, filter={"group": 2})["id"].to_pylist() == ["1", "2"], "a filter does not rename an example"


def test_filter_then_limit(path: Path) -> None:
    assert read(path, filter={"group": [2, 3]}, limit=2)["key"].to_pylist() == ["b-2", "c-3"]
    assert read(path, filter={"group": [2, 3], "text": "four"})["key"].to_pylist() == ["d-4"]
    assert len(read(path, limit=0)) == 0
    assert len(read(path, limit=9)) == 4


def test_a_filter_for_null_finds_nulls(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["x", None, "y"]}), path)
    assert read(path, filter={"text": [None, "y"]})["id"].to_pylist() == ["1", "2"]


def test_columns_are_renamed_before_anything_else(path: Path) -> None:
    rows = read(path, ("sentence",), columns={"text": "sentence", "key": "name"}, id_column="name", filter={"group": 1})
    assert rows.to_pydict() == {"id": ["a-1"], "name": ["a-1"], "sentence": ["one"], "group": [1]}


def test_a_folder_is_read_whole_or_by_split(tmp_path: Path) -> None:
    for name in ("test.csv", "train-00000-of-00002.csv", "train-00001-of-00002.csv"):
        (tmp_path / name).write_text(f"text\n{name[:11]}\n")
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path)["text"].to_pylist() == ["test.csv", "train-00000", "train-00001"]
    assert read(tmp_path, split="train")["text"].to_pylist() == ["train-00000", "train-00001"]
    assert read(tmp_path, split="test")["text"].to_pylist() == ["test.csv"]
    assert TableOptions(data=str(tmp_path)).folder == tmp_path
    assert TableOptions(data=str(tmp_path / "test.csv")).folder == tmp_path


def test_categories_are_read_as_what_they_stand_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), tmp_path / "data.parquet")
    assert read(tmp_path / "data.parquet", filter={"text": "x"})["text"].type == pa.string()


def test_a_saved_data_set_needs_no_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    made = datasets.Dataset.from_dict(COLUMNS)
    datasets.DatasetDict({"train": made, "test": made.select([2])}).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved", split="test")["text"].to_pylist() == ['a "quoted" word']


def test_a_data_set_of_the_hub_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write_separated(tmp_path / "data" / "validation.csv", pa.table(COLUMNS))
    rows = read(f"hf:{tmp_path / 'data'}", split="validation", id_column="key", filter={"group": 2})
    assert rows["text"].to_pylist() == COLUMNS["text"][1:3]
    asked: list[tuple[Any, ...]] = []

    def load_dataset(*names: str | None, split: str) -> Any:
        asked.append((*names, split))
        return datasets.Dataset.from_dict(COLUMNS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for data in ("hf:squad", "hf:nyu-mll/glue", "hf:nyu-mll/glue/mnli"):
        assert len(read(data, split="test")) == 4
    assert asked == [("squad", None, "test"), ("nyu-mll/glue", None, "test"), ("nyu-mll/glue", "mnli", "test")]
    with pytest.raises(TaskError, match="hf:squad needs a split, such as split: validation"):
        read("hf:squad")


def test_a_data_set_that_cannot_be_had_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(TaskError, match=r"cannot read hf:nobody/nothing: ") as caught:
        read("hf:nobody/nothing", split="test")
    assert "\n" not in str(caught.value)


def test_without_the_library_a_data_set_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match="hf:squad needs the package datasets: pip install"):
        read("hf:squad", split="test")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"needed": ("txt",)}, "has no column 'txt' (did you mean 'text'?): it has key, text, group"),
        ({"id_column": "uid"}, "has no column 'uid'"),
        ({"id_column": "group"}, "id '2' occurs more than once: set id_column to a column of unique ids"),
        ({"filter": {"kind": 1}}, "has no column 'kind'"),
        ({"filter": {"group": "two"}}, "filter: column 'group' of"),
        ({"filter": "group"}, "filter must be a mapping of column names, not 'group'"),
        ({"columns": {"txt": "text"}}, "has no column 'txt' to rename: it has key, text, group"),
        ({"columns": {"key": "text"}}, "has more than one column 'text': give them different names in columns"),
        ({"columns": ["text"]}, "columns must be a mapping of column names"),
        ({"limit": -1}, "limit must not be negative, not -1"),
        ({"split": "test"}, "split 'test' of"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, Any], said: str, path: Path) -> None:
    with pytest.raises(TaskError) as caught:
        read(path, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ids_must_be_there_and_be_scalars(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x", "y"], "some": ["1", None], "lists": [[1], [2]]}), tmp_path / "data.parquet")
    with pytest.raises(TaskError, match="an id is null"):
        read(tmp_path / "data.parquet", id_column="some")
    with pytest.raises(TaskError, match="column 'lists' cannot be used as ids"):
        read(tmp_path / "data.parquet", id_column="lists")
    with pytest.raises(TaskError, match=r"column 'lists' has type list<.*>, not text"):
        texts(read(tmp_path / "data.parquet"), "lists", "data.parquet")


def test_a_folder_that_says_too_little_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"has no file ending in \.parquet"):
        read(tmp_path)
    (tmp_path / "a.csv").write_text("text\nx\n")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(TaskError, match=r"has files ending in \.csv and \.jsonl: give one file, or give split"):
        read(tmp_path)
    with pytest.raises(TaskError, match="has no file of split 'dev' ending in"):
        read(tmp_path, split="dev")
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "b.csv").write_text("txt\n1\n")
    with pytest.raises(TaskError, match=r"the files of .* have different columns: b.csv has no column 'text'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("data.parquet", b"PAR1 not a table"),
        ("data.jsonl", b'{"text": '),
        ("data.csv", b"text,b\nc"),
        ("data.csv", b""),
        ("data.tsv", b"a\tb\nc"),
        ("data.arrow", b"\xff\xff\xff\xff\x10"),
        ("data.arrow", b""),
        ("data.feather", b"FEA"),
    ],
)
def test_a_damaged_file_is_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=r"cannot read .*data\.") as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_labels_are_numbers_or_names_in_any_case_or_unknown() -> None:
    assert class_numbers(["Yes", "no", None, 1], ["no", "yes"], "data") == [1, 0, None, 1]
    with pytest.raises(TaskError, match="label 'maybe' is not one of no, yes: give label_names"):
        class_numbers(["maybe"], ["no", "yes"], "data")
    with pytest.raises(TaskError, match="label 2 is not one of the model's 2 classes"):
        class_numbers([2], ["no", "yes"], "data")


STARS = ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("labels", "names", "values", "expected"),
    [
        ([0, 1], ["0", "1"], None, [0, 1]),
        (["1", "4"], STARS, None, [0, 3]),
        ([1, 4], STARS, "numbers", [1, 4]),
        ([1, 5], STARS, "names", [0, 4]),
        ([0], STARS, None, [0]),
        ([True, False, None], ["false", "true"], None, [1, 0, None]),
        (["01", "02"], ["01", "02"], None, [0, 1]),
        ([1, 0], ["a", "A"], None, [1, 0]),
        (["NA", "na"], ["EU", "NA"], None, [1, 1]),
        ([Decimal("2")], ["1", "2"], None, [1]),
    ],
)
def test_labels_that_have_one_meaning_are_read(
    labels: list[Any], names: list[str], values: Any, expected: list[int | None]
) -> None:
    assert class_numbers(labels, names, "data", values) == expected


@pytest.mark.parametrize(
    ("labels", "names", "values", "said"),
    [
        ([1, 4], STARS, None, "label 1 is the number of the class '2' and the name of class 0: set label_values to"),
        ([5], STARS, None, "label 5 is not one of the model's 5 classes: set label_values: names"),
        ([0], STARS, "names", "label 0 is not one of 1, 2, 3, 4, 5: give label_names"),
        (["a"], ["a", "A"], None, "label 'a' can be the classes 'a' and 'A', because the case of labels is ignored"),
        ([1.0], ["no", "yes"], None, "label 1.0 is not one of no, yes: give class numbers as integers"),
        ([float("nan")], ["no", "yes"], None, "label nan is not one of no, yes: give class numbers as integers"),
        ([[1]], ["no", "yes"], None, r"label [1] is not one of no, yes"),
        ([""], ["no", "yes"], None, "label '' is not one of no, yes"),
        ([-1], ["no", "yes"], None, "label -1 is not one of the model's 2 classes: correct it, or filter the rows"),
        (["x"], [str(number) for number in range(1000)], None, "18, 19, …: give label_names"),
    ],
)
def test_labels_of_no_or_several_meanings_are_refused(
    labels: list[Any], names: list[str], values: Any, said: str
) -> None:
    with pytest.raises(TaskError) as caught:
        class_numbers(labels, names, "data", values)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_classes_of_one_name_are_refused() -> None:
    assert distinct_names(["a", "A", 1]) == ("a", "A", "1")
    with pytest.raises(TaskError, match="two classes have the name 'a': give different names in label_names"):
        distinct_names(["a", "b", "a"])


def test_label_values_are_numbers_or_names() -> None:
    with pytest.raises(TaskError, match="label_values must be numbers or names, not 'ids'"):
        LabelOptions(data="data.csv", label_values="ids")  # type: ignore[arg-type]


def test_columns_with_the_names_of_shown_columns_are_left_out_unless_they_are_texts() -> None:
    rows = pa.table({"id": ["x"], "image": ["a.png"], "text": [3], "n": [3]})
    assert example_table(rows, [1], {}, []).column_names == ["id", "label", "n"]
    rows = rows.set_column(2, "text", pa.array(["a caption"]))
    assert example_table(rows, [1], {}, []).column_names == ["id", "label", "text", "n"]


def test_the_examples_table_keeps_scalars_that_nothing_else_says() -> None:
    rows = pa.table({"id": ["x"], "label": ["?"], "text": ["used"], "n": [3], "lists": [[1]], "raw": [b"x"]})
    table = example_table(rows, [1], {"text": pa.array(["shown"])}, ["text"])
    assert table.to_pydict() == {"id": ["x"], "label": [1], "text": ["shown"], "n": [3]}
