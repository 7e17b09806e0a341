"""Examples that are read and tokenized once, into Arrow files, and mapped by every process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from npeff.tasks import Task, TaskError, load_task, table_files
from npeff.tasks.prepared import Arrays, Joined, Prepared, Texts, preparing
from npeff.tasks.tables import TableOptions

pytest.importorskip("transformers", reason="needs pip install 'npeff-pipeline[hf]'")

import tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
)

TEXTS = ["a small cat", None, "the dog sleeps and the cat sings", "dog", "a bird sings near the tree ?"] * 5
OTHERS = ["the dog", "a tree", "in", "sleeps", "near a cat"] * 5
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    "sequence-classification": {"text_columns": ["text", "other"], "label_column": "class"},
    "causal-lm": {"text_column": "text", "prompt_column": "other"},
    "causal-lm of positions": {"text_column": "other", "examples": "positions"},
}


def table() -> pa.Table:
    keys = [f"row {number}" for number in range(len(TEXTS))]
    return pa.table({"key": keys, "text": TEXTS, "other": OTHERS, "class": [0, 1, 2, None, 1] * 5, "n": range(25)})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    config = BertConfig(max_position_embeddings=24, num_labels=3, **SMALL, **tiny.SIZE)
    tiny.save_model(folder / "sequence-classification", AutoModelForSequenceClassification, config)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 24, "eos_token_id": tiny.END}
    tiny.save_model(folder / "causal-lm", AutoModelForCausalLM, GPT2Config(**sizes, **tiny.SIZE))
    for model in folder.iterdir():
        tiny.save_tokenizer(model, types=model.name != "causal-lm")
    return folder


def task(family: str, models: Path, data: Path) -> Task:
    name = family.split()[0]
    options = {"model": str(models / name), "data": str(data), "id_column": "key", **FAMILIES[family]}
    return load_task(f"huggingface-{name}", options)


def tensors(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    inputs = batch.get("inputs", {})
    return inputs | {name: value for name, value in batch.items() if name != "inputs"}


@pytest.mark.parametrize("family", FAMILIES)
def test_prepared_examples_are_those_of_the_data(family: str, models: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.parquet"
    pq.write_table(table(), data)
    made = task(family, models, data)
    from_data = made.examples(tmp_path)
    made.prepare(tmp_path)
    data.unlink()  # no process reads it again
    prepared = made.examples(tmp_path)
    assert prepared.table().equals(from_data.table())
    indices = [len(prepared) - 1, 0, 2]
    one, other = (tensors(each.batch(indices)) for each in (prepared, from_data))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert np.array_equal(np.array(prepared.lengths()), np.array(from_data.lengths()))
    assert prepared.tokens(indices) == from_data.tokens(indices)


def test_a_second_preparation_keeps_equal_files_and_replaces_others(models: Path, tmp_path: Path) -> None:
    data, cache = tmp_path / "data.parquet", tmp_path / "cache"
    pq.write_table(table(), data)
    made = task("causal-lm", models, data)
    made.prepare(cache)
    before = {file.name: file.stat().st_mtime_ns for file in (cache / "examples").iterdir()}
    made.prepare(cache)
    assert {file.name: file.stat().st_mtime_ns for file in (cache / "examples").iterdir()} == before
    pq.write_table(table().slice(5), data)
    made.prepare(cache)
    assert len(made.examples(cache)) == 20
    assert [path.name for path in cache.iterdir()] == ["examples"]


def test_data_with_a_mistake_leave_nothing(models: Path, tmp_path: Path) -> None:
    data, cache = tmp_path / "data.parquet", tmp_path / "cache"
    pq.write_table(table().set_column(0, "key", [["same"] * 25]), data)
    with pytest.raises(TaskError, match="id 'same' occurs more than once"):
        task("causal-lm", models, data).prepare(cache)
    assert not list(cache.iterdir())


def test_rows_are_those_of_a_list() -> None:
    texts = Texts(pa.chunked_array([["a", None], ["b", "c"]]), "no texts")
    numbers = Arrays(pa.chunked_array([[[0], [1, 2]], [[], [3]]]))
    whole = ["a", "", "b", "c"]
    for rows, expected in [
        (texts, whole),
        (Joined([texts, whole], "-"), [f"{each}-{each}" for each in whole]),
        (numbers, [[0], [1, 2], [], [3]]),
    ]:
        assert [list(row) if rows is numbers else row for row in rows] == expected
        for place in range(-4, 4):
            assert list(rows[place]) == list(expected[place])
        for part in (
            slice(None),
            slice(1, 3),
            slice(-2, None),
            slice(9, 12),
            slice(None, None, 2),
            slice(None, None, -1),
        ):
            assert [list(row) for row in rows[part]] == [list(row) for row in expected[part]]
        for place in (-5, 4):
            with pytest.raises(IndexError, match=f"row {place} is not one of 4"):
                rows[place]


def test_files_of_other_options_are_not_used(tmp_path: Path) -> None:
    with preparing(tmp_path, {"data": "run.parquet"}) as files:
        files.table("texts", lambda: [pa.table({"text": ["of the run"]})])
    tables = [
        Prepared.of(tmp_path, {"data": data}).table("texts", lambda: [pa.table({"text": ["of other data"]})])
        for data in ("run.parquet", "own.parquet")
    ]
    assert [table["text"].to_pylist() for table in tables] == [["of the run"], ["of other data"]]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_is_read_in_parts(kind: pa.DataType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_files, "_ROWS_AT_ONCE", 3)
    whole = table().set_column(1, "text", table()["text"].cast(kind))
    untyped = whole.slice(0, 4).set_column(3, "class", pa.nulls(4))  # all of its labels are unknown
    (tmp_path / "parts").mkdir()
    for number, part in enumerate([untyped, whole.slice(4, 10), whole.slice(14)]):
        pq.write_table(part, tmp_path / "parts" / f"{number}.parquet")
    expected = whole.slice(0, 4).to_pylist()
    expected = [{**row, "class": None} for row in expected] + whole.slice(4).to_pylist()
    options: dict[str, Any] = {"data": str(tmp_path / "parts"), "filter": {"n": [1, 5, 6, 13, 14, 20]}, "limit": 5}
    with preparing(tmp_path, options) as files:
        rows = TableOptions(**options).read(["text"], files=files)
        assert rows.to_pylist() == [{"id": str(n), **expected[n]} for n in (1, 5, 6, 13, 14)]
        assert rows.equals(TableOptions(**options).read(["text"]))


def test_files_with_other_columns_or_types_are_refused(tmp_path: Path) -> None:
    for number, column in enumerate([["1"], [1]]):
        pq.write_table(pa.table({"text": ["x"], "n": column}), tmp_path / f"{number}.parquet")
    with pytest.raises(TaskError, match=r"the files of .* have different columns"):
        TableOptions(data=str(tmp_path)).read(["text"])


def test_a_data_set_is_streamed_from_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs pip install datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    for number in range(2):
        pq.write_table(table().slice(10 * number, 10), tmp_path / "data" / f"train-{number}.parquet")
    options: dict[str, Any] = {"data": f"hf:{tmp_path / 'data'}", "split": "train", "streaming": True, "limit": 12}
    assert TableOptions(**options).read(["text"]).drop_columns("id").to_pylist() == table().slice(0, 12).to_pylist()
    assert not list(tmp_path.glob("cache/**/*.arrow")), "nothing is converted"
    with pytest.raises(TaskError, match="streaming is for data sets of the hub"):
        TableOptions(data=str(tmp_path / "data"), streaming=True)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_rows_of_a_mapped_table_are_those_in_memory(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npeff.tasks.prepared.PART_ROWS", size)
    lists = [[], [1, 2], [3], [], [4, 5, 6], [7]]
    whole = pa.table({"lists": pa.array(lists, pa.list_(pa.int32())), "text": ["a", None, "bé", "", "c", "d"]})
    parts = [whole.slice(start, 2) for start in (0, 2, 4)]
    mapped = Prepared().table("some", lambda: parts)
    assert mapped.equals(whole)
    arrays, texts = Arrays(mapped["lists"]), Texts(mapped["text"], "not text")
    assert [row.tolist() for row in arrays] == lists == [arrays[row - 6].tolist() for row in range(6)]
    assert [row.tolist() for row in arrays[1:5:2]] == lists[1:5:2]
    assert arrays.lengths().tolist() == [0, 2, 1, 0, 3, 1]
    assert arrays.joined().tolist() == [1, 2, 3, 4, 5, 6, 7]
    sliced = Arrays(pa.chunked_array([mapped["lists"].combine_chunks().slice(2)]))
    assert [row.tolist() for row in sliced] == lists[2:]
    assert [start + int(offsets[-1]) for start, offsets, _ in sliced.chunks()] == [5]
    assert list(texts) == ["a", "", "bé", "", "c", "d"] == [texts[row] for row in range(6)]
    assert Joined([texts, texts], "-")[1:3] == ["-", "bé-bé"]
    with pytest.raises(IndexError):
        arrays[6]
    with pytest.raises(IndexError):
        texts[6]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("npeff.tasks.prepared.os.fsync", full)
    with pytest.raises(TaskError, match=r"cannot write .*: No space left on device: free space"):
        Prepared(tmp_path).table("some", lambda: [pa.table({"n": [1]})])
    assert not list(tmp_path.iterdir())
