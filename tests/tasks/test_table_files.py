"""Files of tables are read as they were written, or refused in one line that names the line of the file."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from npeff.tasks import TaskError
from npeff.tasks.tables import TableOptions, texts

CODES = [
    "0001",
    "1e5",
    "2020-01-01",
    "NA",
    "null",
    "true",
    "1.10",
    "None",
    "+7",
    "9999999999999999999999999",
    "-0",
    "nan",
]


def read(path: Path, *needed: str, label: str | None = None, **options: Any) -> pa.Table:
    return TableOptions(data=str(path), **options).read(needed or ["text"], label)


def rows_of(path: Path, content: str | bytes, **options: Any) -> dict[str, list[Any]]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(path, **options).drop_columns(["id"]).to_pydict()


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "data.txt", "data.jsonl"])
def test_ids_and_texts_that_look_like_numbers_dates_or_nulls_stay_as_written(name: str, tmp_path: Path) -> None:
    lines = [json.dumps({"key": code, "text": code, "label": code}) for code in CODES]
    if not name.endswith(".jsonl"):
        separator = "," if name.endswith(".csv") else "\t"
        lines = [separator.join(cells) for cells in [("key", "text", "label"), *((code,) * 3 for code in CODES)]]
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    rows = read(tmp_path / name, id_column="key", label="label")
    assert [rows[column].to_pylist() for column in ("id", "text", "label")] == [CODES] * 3
    renamed = read(tmp_path / name, "id", columns={"key": "id"}, id_column="id", limit=3)
    assert renamed["id"].to_pylist() == CODES[:3]


def test_numbers_of_json_are_texts_as_they_are_written(tmp_path: Path) -> None:
    values = ["1.10", "1e5", "7", "true", '"0001"', "12345678901234567890123", "-0.0", "NaN"]
    content = "".join(f'{{"text": {value}, "n": {number}}}\n' for number, value in enumerate(values))
    found = rows_of(tmp_path / "data.jsonl", content)
    assert found["text"] == ["1.10", "1e5", "7", "true", "0001", "12345678901234567890123", "-0.0", "nan"]
    assert found["n"] == list(range(len(values)))
    large = ["9223372036854775807", "9223372036854775808", "-123456789012345678901234567890"]
    assert (
        rows_of(tmp_path / "large.jsonl", "".join(f'{{"text": {value}, "n": 1}}\n' for value in large))["text"] == large
    )


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["1", "-20", "0"], [1, -20, 0]),
        (["1", "", "NA"], [1, None, None]),
        (["1.5", "2", "1e3", "-.5"], [1.5, 2.0, 1000.0, -0.5]),
        (["true", "False", ""], [True, False, None]),
        (["001", "2"], ["001", "2"]),
        (["1", "x"], ["1", "x"]),
        (["", "NA"], ["", "NA"]),
        (["2020-01-01", "2020-01-02"], ["2020-01-01", "2020-01-02"]),
        (["99999999999999999999", "1"], ["99999999999999999999", "1"]),
    ],
)
def test_other_columns_of_a_csv_file_are_numbers_if_all_their_cells_are(
    cells: list[str], expected: list[Any], tmp_path: Path
) -> None:
    content = "text,other\n" + "".join(f"x,{cell}\n" for cell in cells)
    found = rows_of(tmp_path / "data.csv", content)["other"]
    assert list(zip(map(type, found), found, strict=True)) == list(zip(map(type, expected), expected, strict=True))


@pytest.mark.parametrize(
    ("cells", "expected"),
    [(["1", "0", ""], [1, 0, None]), (["01", "1"], ["01", "1"]), (["NA", "EU", ""], ["NA", "EU", None])],
)
def test_labels_of_a_csv_file_are_integers_if_all_their_cells_are(
    cells: list[str], expected: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "data.csv").write_text("text,label\n" + "".join(f"x,{cell}\n" for cell in cells))
    assert read(tmp_path / "data.csv", label="label")["label"].to_pylist() == expected


def test_ids_are_filtered_as_texts_or_as_integers(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("key,text\n1,a\n02,b\n3,c\n")
    for wanted in ([1, 3], ["1", "3"]):
        rows = read(tmp_path / "data.csv", id_column="key", filter={"key": wanted})
        assert rows["text"].to_pylist() == ["a", "c"]


def test_types_of_a_folder_are_those_of_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,score\n1,2\n")
    (tmp_path / "b.csv").write_text("text,score\nx,high\n")
    assert read(tmp_path)["score"].to_pylist() == ["2", "high"]


LONG = 'a line, with a comma\nand "quotes"\r\n' * 60_000
WELL_FORMED: dict[str, tuple[str, str | bytes, dict[str, list[Any]]]] = {
    "line breaks in quotes": ("csv", 'text,n\n"a\nb",1\n"c\r\nd",2\n', {"text": ["a\nb", "c\r\nd"], "n": [1, 2]}),
    "2 MB in one cell": ("csv", f'text\n"{LONG.replace(chr(34), chr(34) * 2)}"\n', {"text": [LONG]}),
    "doubled quotes": ("csv", 'text\n"a ""b"" c"\n', {"text": ['a "b" c']}),
    "quotes in a cell without": ("csv", 'text\n5" disk\n', {"text": ['5" disk']}),
    "Windows line ends": ("csv", "text,n\r\na,1\r\nb,2\r\n", {"text": ["a", "b"], "n": [1, 2]}),
    "former Macintosh line ends": ("csv", "text,n\ra,1\rb,2\r", {"text": ["a", "b"], "n": [1, 2]}),
    "no line end at the end": ("csv", "text,n\na,1", {"text": ["a"], "n": [1]}),
    "empty lines": ("csv", "\ntext,n\n\na,1\n\n", {"text": ["a"], "n": [1]}),
    "an empty text in quotes": ("csv", 'text\n""\na\n', {"text": ["", "a"]}),
    "spaces": ("csv", "text,n\n a ,1\n", {"text": [" a "], "n": [1]}),
    "a column without a name": ("csv", ",text\n0,a\n", {"": [0], "text": ["a"]}),
    "a byte order mark": ("csv", codecs.BOM_UTF8 + b"text\nx\n", {"text": ["x"]}),
    "UTF-16": ("csv", "text,n\nñ,1\n".encode("utf-16"), {"text": ["ñ"], "n": [1]}),
    "UTF-16, high byte first": ("csv", codecs.BOM_UTF16_BE + "text\nñ\n".encode("utf-16-be"), {"text": ["ñ"]}),
    "UTF-32": ("tsv", "text\nñ\n".encode("utf-32"), {"text": ["ñ"]}),
    "other line separators": ("csv", "text\na\u2028b\x0bc\x85d\n", {"text": ["a\u2028b\x0bc\x85d"]}),
    "quotes in a TSV file": ("tsv", 'text\tn\n"a\t1\n', {"text": ['"a'], "n": [1]}),
    "5 MB in a line of TSV": ("tsv", f"text\tn\n{'x' * 5_000_000}\t1\n", {"text": ["x" * 5_000_000], "n": [1]}),
    "5 MB in a line of JSON": ("jsonl", json.dumps({"text": "x" * 5_000_000}), {"text": ["x" * 5_000_000]}),
    "JSON with a byte order mark": ("jsonl", codecs.BOM_UTF8 + b'{"text": "x"}\n', {"text": ["x"]}),
    "JSON in UTF-16": ("jsonl", '{"text": "ñ"}\n'.encode("utf-16"), {"text": ["ñ"]}),
    "JSON with Windows line ends": ("jsonl", '{"text": "a"}\r\n\r\n{"text": "b"}\r\n', {"text": ["a", "b"]}),
    "JSON with missing names": ("jsonl", '{"text": "a", "n": 1}\n{}\n', {"text": ["a", None], "n": [1, None]}),
    "JSON with escapes": ("jsonl", r'{"text": "\u0000\ud83d\ude00\n"}', {"text": ["\0😀\n"]}),
    "integers and floats": ("jsonl", '{"text": 1}\n{"text": "a", "n": 2.5}\n', {"text": ["1", "a"], "n": [None, 2.5]}),
    "numbers in JSON": ("jsonl", '{"n": 1}\n{"text": "a", "n": 2.5}\n', {"n": [1.0, 2.5], "text": [None, "a"]}),
    "other dates in JSON": ("jsonl", '{"text": "a", "n": "2020-01-01"}', {"text": ["a"], "n": ["2020-01-01"]}),
}  # fmt: skip


@pytest.mark.parametrize("name", WELL_FORMED)
def test_a_well_formed_file_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    ending, content, expected = WELL_FORMED[name]
    assert rows_of(tmp_path / f"data.{ending}", content) == expected


def test_many_rows_with_line_breaks_are_read(tmp_path: Path) -> None:
    found = rows_of(
        tmp_path / "data.csv", "text,n\n" + "".join(f'"row\n{number}",{number}\n' for number in range(40_000))
    )
    assert found["text"][-1] == "row\n39999"
    assert found["n"] == list(range(40_000))


def test_nested_values_that_are_not_used_can_have_any_form(tmp_path: Path) -> None:
    content = '{"text": "a", "meta": {"x": 1}}\n{"text": "b", "meta": [[1], "y"]}\n{"text": "c"}\n'
    found = rows_of(tmp_path / "data.jsonl", content)
    assert (found["text"], len(found["meta"])) == (["a", "b", "c"], 3)


MALFORMED: dict[str, tuple[str, str | bytes, str]] = {
    "an empty file": ("csv", "", "it is empty: give a file with a line of column names"),
    "empty lines only": ("csv", "\n\n", "it is empty"),
    "a header only": ("csv", "text,n\n", "has no row: give data with at least one row"),
    "a short row": ("csv", "text,n\na,1\nb\n", "line 3 begins a row of 1 cells, but the header has 2"),
    "a long row": ("csv", 'text,n\n"a\nb",1\nc,2,3\n', "line 4 begins a row of 3 cells, but the header has 2: put"),
    "a long row of TSV": ("tsv", "text\tn\na\t1\t2\n", "line 2 begins a row of 3 cells, but the header has 2: corr"),
    "an open quote": ("csv", 'text\na\n"b\nc\n', "line 3 begins a row with a quote that is not closed"),
    "an open quote before a closed one": ("csv", 'text,n\n"a,1\n"b",2\n', "line 2 begins a row with a quote"),
    "a text after a quote": ("csv", 'text\n"a"b\n', "line 2 begins a row with a quote that is not"),
    "an open quote in the header": ("csv", '"text\na\n', "line 1 begins a row with a quote"),
    "doubled columns": ("csv", "text,text\na,b\n", "has more than one column 'text': rename or remove one of them"),
    "Latin-1": ("csv", "text\na\nñ\n".encode("latin-1"), "line 3 is not UTF-8: save the file as UTF-8"),
    "Latin-1 in the header": ("tsv", "ñ\na\n".encode("latin-1"), "line 1 is not UTF-8"),
    "Latin-1 in a column that is not used": ("csv", b"text,n\na,\xff\n", "line 2 is not UTF-8"),
    "half of UTF-16": ("csv", "text\nx\n".encode("utf-16")[:-1], "is not UTF-16"),
    "UTF-16 without a mark": ("csv", "text\nx\n".encode("utf-16-le"), "line 1 contains a NUL character: save"),
    "a NUL": ("csv", "text\na\nb\0\n", "line 3 contains a NUL character: write the file again"),
    "zeros": ("jsonl", bytes(4096), "line 1 contains a NUL character"),
    "empty JSON": ("jsonl", "\n", "it is empty: write one JSON object per line"),
    "half a line": ("jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON (column 10: Expecting value)"),
    "an array": ("jsonl", '[{"text": "a"}]', "line 1 is not a JSON object: write one JSON object per line"),
    "an object of several lines": ("jsonl", '{\n"text": "a"\n}\n', "line 1 is not JSON"),
    "two objects in a line": ("jsonl", '{"text": "a"} {"text": "b"}\n', "line 1 is not JSON (column 15: Extra data)"),
    "a name twice": ("jsonl", '{"text": "a", "text": "b"}\n', "line 1 cannot be read (an object has a name twice)"),
    "Latin-1 in JSON": ("jsonl", '{"text": "ñ"}'.encode("latin-1"), "line 1 is not UTF-8"),
    "deep JSON": ("jsonl", '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1 is nested too deeply"),
    "deep objects": ("jsonl", '{"text": ' * 100_000 + "1" + "}" * 100_000, "line 1 is nested too deeply"),
    "values of two kinds": ("jsonl", '{"text": "a", "n": 1}\n{"text": "b", "n": "x"}', "line 2 has a 'n' that "),
    "a large integer": ("jsonl", '{"text": "a", "n": 123456789012345678901}', "line 1 has a 'n' that does not fit"),
    "5,000 digits": ("jsonl", '{"text": "a", "n": 1' + "0" * 5000 + "}", "line 1 cannot be read"),
    "half a character": ("jsonl", '{"text": "a"}\n{"text": "\\ud800"}', "line 2 has a 'text' that does not fit"),
    "JSON instead of JSON lines": ("json", '[{"text": "a"}]', "use a file ending in .parquet, .csv, .tsv, .jsonl"),
    "no Parquet": ("parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    ending, content, said = MALFORMED[name]
    with pytest.raises(TaskError) as caught:
        rows_of(tmp_path / f"data.{ending}", content)
    assert said in str(caught.value)
    assert f"data.{ending}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_pipe_and_doubled_columns_of_parquet_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(TaskError, match="it is not a file: give a file, or a folder of files"):
        read(tmp_path / "pipe.csv")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "data.parquet")
    with pytest.raises(TaskError, match="more than one column 'text': rename or remove one of them in the data"):
        read(tmp_path / "data.parquet")


def test_an_id_that_is_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("key,text\n1,a\n,b\n")
    with pytest.raises(TaskError, match="an id is empty: set id_column to a column with an id in every row"):
        read(tmp_path / "data.csv", id_column="key")


def test_a_filter_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text,n\na,1\n")
    with pytest.raises(TaskError, match="has no row that meets filter: correct filter"):
        read(tmp_path / "data.csv", filter={"n": 2})


VIEWS = pa.array(["x", "y"], pa.string_view())
UUIDS = pa.array([bytes(16), None], pa.binary(16))
NOON = datetime(2020, 1, 1, 12, tzinfo=UTC)
ARROW: dict[str, tuple[pa.Array, list[str]]] = {
    "string": (pa.array(["0001", ""]), ["0001", ""]),
    "string_view": (pa.array(["0001", "x"], pa.string_view()), ["0001", "x"]),
    "large_string": (pa.array(["0001", "x"], pa.large_string()), ["0001", "x"]),
    "dictionary": (pa.array(["y", "x"]).dictionary_encode(), ["y", "x"]),
    "dictionary of views": (pa.DictionaryArray.from_arrays(pa.array([1, 0]), VIEWS), ["y", "x"]),
    "dictionary of integers": (pa.array([7, 5]).dictionary_encode(), ["7", "5"]),
    "runs": (pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array(["x", "y"])), ["x", "y"]),
    "decimal": (pa.array([Decimal("1.10"), Decimal("2.00")]), ["1.10", "2.00"]),
    "large decimal": (pa.array([Decimal("1.10"), Decimal("2")], pa.decimal256(50, 2)), ["1.10", "2.00"]),
    "date": (pa.array([date(2020, 1, 1), date(2020, 1, 2)]), ["2020-01-01", "2020-01-02"]),
    "timestamp": (pa.array([NOON, None], pa.timestamp("ms", "UTC")), ["2020-01-01 12:00:00.000Z", ""]),
    "binary": (pa.array([b"x", b"y"]), ["x", "y"]),
    "binary_view": (pa.array([b"x", b"y"], pa.binary_view()), ["x", "y"]),
    "uint64": (pa.array([2**64 - 1, 0], pa.uint64()), ["18446744073709551615", "0"]),
    "boolean": (pa.array([True, False]), ["true", "false"]),
    "UUID": (pa.ExtensionArray.from_storage(pa.uuid(), UUIDS), [str(UUID(int=0)), ""]),
}  # fmt: skip


def write_ipc(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        *((name, write_ipc) for name in ARROW),
        *((name, write_parquet) for name in ARROW if name not in ("runs", "dictionary of views")),
    ],
)
def test_every_type_of_arrow_is_read_as_text(name: str, write: Callable[..., None], tmp_path: Path) -> None:
    values, expected = ARROW[name]
    path = tmp_path / ("data.parquet" if write is write_parquet else "data.arrow")
    write(path, pa.table({"text": values, "n": [0, 1]}))
    assert list(texts(read(path, filter={"n": [0, 1]}), "text", "data")) == expected
    if values.null_count == 0 and all(expected):
        assert read(path, id_column="text")["id"].to_pylist() == expected
        assert read(path, filter={"text": values[1].as_py()})["n"].to_pylist() == [1]


LISTS = [pa.list_(pa.string()), pa.large_list(pa.string_view()), pa.list_view(pa.string()), pa.list_(pa.string(), 2)]


@pytest.mark.parametrize("kind", LISTS, ids=str)
def test_every_type_of_list_is_read_as_a_list(kind: pa.DataType, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([["a", "b"]], kind)}), tmp_path / "data.parquet")
    column = read(tmp_path / "data.parquet")["text"]
    assert pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    assert column.to_pylist() == [["a", "b"]]


def test_metadata_of_a_parquet_file_has_no_effect(tmp_path: Path) -> None:
    metadata = {"pandas": '{"index_columns": ["text"], "columns": []}', "huggingface": "no JSON", "x": "y" * 100_000}
    pq.write_table(pa.table({"text": ["a"]}).replace_schema_metadata(metadata), tmp_path / "data.parquet")
    rows = read(tmp_path / "data.parquet")
    assert rows.to_pydict() == {"id": ["0"], "text": ["a"]}
    assert rows.schema.metadata is None


def test_a_damaged_parquet_file_is_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": ["0001", "é"] * 20, "n": range(40)}), path)
    intact = path.read_bytes()
    refused = 0
    for position in range(0, len(intact), 37):
        path.write_bytes(intact[:position] + bytes([intact[position] ^ 0xFF]) + intact[position + 1 :])
        try:
            list(texts(read(path), "text", "data"))
        except TaskError:
            refused += 1
    assert refused > 10


def test_texts_of_a_parquet_file_that_are_not_utf_8_are_one_line(tmp_path: Path) -> None:
    broken = pa.array([b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "data.parquet")
    with pytest.raises(TaskError, match=r"cannot read .*data\.parquet: .*UTF8"):
        read(tmp_path / "data.parquet")


def test_a_deep_parquet_schema_is_one_line(tmp_path: Path) -> None:
    deep = pa.array([1])
    for _ in range(300):
        deep = pa.StructArray.from_arrays([deep], ["x"])
    pq.write_table(pa.table({"text": ["a"], "deep": deep}), tmp_path / "data.parquet", store_schema=False)
    with pytest.raises(TaskError, match=r"cannot read .*nested"):
        read(tmp_path / "data.parquet")
