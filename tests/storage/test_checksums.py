from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from npeff.storage.checksums import checksum, read_json, sealed, write_json_atomically
from npeff.storage.errors import StoreError
from npeff.store.shard_records import CompletionRecord, ShardRecords

RECORD = CompletionRecord(
    shard=7, start=70, stop=80, checksum="abc", n_invalid=1, seconds=0.25, signature="configuration"
)


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x.json"
    obj = {"text": "größe", "list": [1, 2.5, None], "nested": {"true": True}}
    write_json_atomically(path, obj)
    assert read_json(path) == obj
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]


def test_json_refuses_nan_and_keeps_the_former_file(tmp_path: Path) -> None:
    write_json_atomically(tmp_path / "x.json", [1])
    with pytest.raises(ValueError, match="JSON"):
        write_json_atomically(tmp_path / "x.json", [float("nan")])
    assert read_json(tmp_path / "x.json") == [1]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe"])
def test_damaged_json_is_reported_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"x\.json is damaged .* delete it"):
        read_json(tmp_path / "x.json")


def test_missing_json_is_reported_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"cannot read .*x\.json: No such file"):
        read_json(tmp_path / "x.json")


def test_checksum_depends_on_names_types_shapes_and_bytes_but_not_on_order_or_layout() -> None:
    a, b = np.arange(6, dtype=np.float32), np.arange(4)
    reference = checksum({"a": a, "b": b})
    assert reference == checksum({"b": b, "a": a})
    assert reference == checksum({"a": np.repeat(a, 2)[::2], "b": b})
    changed = a.copy()
    changed[3] = np.nextafter(changed[3], 9)
    others: list[dict[str, np.ndarray]] = [
        {"a": a, "c": b},
        {"a": a},
        {"a": a.reshape(2, 3), "b": b},
        {"a": a.view(np.int32), "b": b},
        {"a": changed, "b": b},
        {"a": a, "b": b.astype(np.int32)},
    ]
    assert len({reference, *map(checksum, others)}) == 1 + len(others)


def test_checksum_takes_empty_scalar_and_boolean_arrays_but_no_objects() -> None:
    assert checksum({"a": np.empty((0, 3))}) != checksum({"a": np.empty((0, 4))})
    assert checksum({"a": np.array(1.0)}) != checksum({"a": np.array([1.0])})
    assert checksum({"a": np.array([True])}) != checksum({"a": np.array([False])})
    with pytest.raises(ValueError, match="objects"):
        checksum({"a": np.array([None])})


def test_records_come_back_by_shard_in_order(tmp_path: Path) -> None:
    records = ShardRecords(tmp_path / "shards", "configuration")
    assert records.complete() == {}
    for shard in (12, 7, 100_000):
        records.write(replace(RECORD, shard=shard))
    complete = records.complete()
    assert list(complete) == [7, 12, 100_000]
    assert complete[7] == RECORD
    assert (tmp_path / "shards" / "00007.json").is_file()


def test_what_a_killed_writer_left_is_no_record(tmp_path: Path) -> None:
    records = ShardRecords(tmp_path, "configuration")
    (tmp_path / "00003.json.partial").write_text('{"shard": 3')
    assert records.complete() == {}


def test_a_record_of_another_signature_is_refused(tmp_path: Path) -> None:
    ShardRecords(tmp_path, "configuration").write(RECORD)
    with pytest.raises(StoreError, match=r"00007\.json belongs to another run .*choose another run_dir"):
        ShardRecords(tmp_path, "other").complete()
    with pytest.raises(ValueError, match="signature"):
        ShardRecords(tmp_path, "other").write(RECORD)


@pytest.mark.parametrize(
    "damage",
    [{"shard": 8}, {"stop": "80"}, {"checksum": None}, {"more": 1}],
    ids=["shard of another name", "wrong type", "null", "unknown field"],
)
def test_a_damaged_record_is_refused(tmp_path: Path, damage: dict[str, object]) -> None:
    records = ShardRecords(tmp_path, "configuration")
    records.write(RECORD)
    path = tmp_path / "00007.json"
    path.write_text(json.dumps(sealed({**read_json(path), **damage})))
    with pytest.raises(StoreError, match=r"00007\.json is not a completion record: delete it"):
        records.complete()


def test_a_flipped_bit_in_a_sealed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    written = {"a": 1.5, "b": [1, "x"], "3": None}
    write_json_atomically(path, written)
    assert read_json(path) == written
    content = path.read_bytes()
    for place in range(len(content) - 1):
        flipped = bytearray(content)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        with suppress(StoreError):
            assert read_json(path).items() >= written.items(), "space between words, or the name of the seal"


def test_an_object_without_a_seal_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
