"""The promises of the store, on an object store: whatever request fails, what is there is whole, old or new."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from npeff.storage import objects as store_objects
from npeff.storage.atomic import is_committed, remove_directory, write_file_atomically
from npeff.storage.errors import ObjectStoreError, StoreError
from npeff.storage.location import location
from npeff.store.checkpoint import CheckpointStore, write_checkpoint_array
from npeff.store.component_store import open_factorization, write_factorization
from npeff.store.diagonal_store import DiagonalSums
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.fit_store import FitStore
from npeff.store.shard_records import CompletionRecord, ShardRecords
from npeff.store.tables import read_table, write_table
from npeff.store.task_files import preparing, task_files
from object_store import BROKEN, DENIED, SLOW_DOWN, Answer, ObjectStore, Request, other_environment

RUN = "s3://runs/some/run"
CHANGES = ("PUT", "DELETE", "DELETE many", "multipart")


def changes(request: Request) -> bool:
    return request.kind in CHANGES


def at_every_change(s3: ObjectStore, write: Callable[[int], object], check: Callable[[int], None]) -> int:
    """Write version 1, 2, ...; the n-th change of each fails once, and then it is written again; how many failed."""
    for version in itertools.count(1):
        with s3.failing(BROKEN, changes, first=version - 1, count=1):
            try:
                write(version)
                return version - 1
            except ObjectStoreError:
                check(version)
        write(version)
    raise AssertionError


# Files


def write(path: Path, content: bytes) -> None:
    write_file_atomically(path, lambda stream: stream.write(content))


def test_a_file_is_replaced_whole_or_not_at_all(s3: ObjectStore) -> None:
    path = location(f"{RUN}/a.txt")
    write(path, b"old")
    with s3.failing(DENIED, changes), pytest.raises(ObjectStoreError, match=r"s3://runs/some/run/a.txt.*denied"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    write(path, b"new")
    assert path.read_text(encoding="utf-8") == "new"


def test_a_torn_multipart_upload_leaves_nothing_to_see(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_objects, "PART_BYTES", 5 * 2**20)
    path, large = location(f"{RUN}/a.bin"), bytes(11 * 2**20)
    write(path, b"old")
    with s3.failing(SLOW_DOWN, changes, first=2, count=1), pytest.raises(ObjectStoreError):  # a part
        write(path, large)
    assert path.read_bytes() == b"old"
    assert s3.uploads() == []
    with s3.failing(BROKEN, changes, first=4), pytest.raises(ObjectStoreError):  # from its completion on, as in a kill
        write(path, large)
    assert path.read_bytes() == b"old"
    assert len(s3.uploads()) == 1, "the bucket's lifecycle rule removes it"
    assert list(s3.contents(RUN)) == ["a.bin"]
    write(path, large)
    assert path.read_bytes() == large


def test_tables_and_fits_are_read_as_they_were_written(s3: ObjectStore) -> None:
    write_table(f"{RUN}/tables/classes.parquet", "classes", {"class": [0, 1], "name": ["a", "b"]})
    assert read_table(f"{RUN}/tables/classes.parquet", "classes")["name"].to_pylist() == ["a", "b"]
    with pytest.raises(StoreError, match="there is no table at s3://"):
        read_table(f"{RUN}/tables/history.parquet", "history")
    fits = FitStore(f"{RUN}/partial/select", "s")
    assert not fits.has("3-0-all")
    fits.write("3-0-all", np.eye(3), {"explained": 0.5})
    np.testing.assert_array_equal(fits.read("3-0-all").components_KD, np.eye(3))


# Shards


def create(path: str) -> FisherStore:
    return FisherStore.create(
        path, n_examples=8, rank=2, dim=48, n_classes=3, shard_size=4, store_dtype="float16", attrs={}
    )


def test_a_shard_is_the_same_object_as_a_local_file(
    s3: ObjectStore, tmp_path: Path, shard_arrays: Callable[..., dict[str, np.ndarray]]
) -> None:
    stores = create(f"{RUN}/fishers.zarr"), create(str(tmp_path / "fishers.zarr"))
    checksums = [store.write_shard(1, shard_arrays(4)) for store in stores]
    assert checksums[0] == checksums[1]
    files = {file for file in (tmp_path / "fishers.zarr").rglob("*") if file.is_file()}
    local = {file.relative_to(tmp_path).as_posix(): file.read_bytes() for file in files}
    assert s3.contents(RUN) == local
    again = FisherStore.open(f"{RUN}/fishers.zarr")
    np.testing.assert_array_equal(again.read_shard(1, checksums[0])["labels"], shard_arrays(4)["labels"])
    np.testing.assert_array_equal(again.read_rows([6, 4], ["frobenius_norms"])["frobenius_norms"],
                                  shard_arrays(4)["frobenius_norms"][[2, 0]])  # fmt: skip
    with pytest.raises(StoreError, match=r"shard 0 .* has no factors"):
        again.read_shard(0)


def test_a_shard_that_is_written_again_is_there_all_the_time(
    s3: ObjectStore, shard_arrays: Callable[..., dict[str, np.ndarray]]
) -> None:
    store = create(f"{RUN}/fishers.zarr")
    checksum = store.write_shard(0, shard_arrays(4))
    with s3.failing(BROKEN, changes, first=2), pytest.raises(ObjectStoreError):
        store.write_shard(0, shard_arrays(4))
    store.read_shard(0, checksum)


def test_no_answer_is_not_taken_for_damage(s3: ObjectStore, shard_arrays: Callable[..., dict[str, np.ndarray]]) -> None:
    store = create(f"{RUN}/fishers.zarr")
    store.write_shard(0, shard_arrays(4))
    checkpoints = CheckpointStore(f"{RUN}/checkpoints", config_hash="c")
    commit(checkpoints, 1)
    with s3.failing(SLOW_DOWN, lambda request: request.kind == "GET"):
        with pytest.raises(ObjectStoreError):
            store.read_shard(0)
        with pytest.raises(ObjectStoreError):
            checkpoints.latest()
        with pytest.raises(ObjectStoreError):
            FisherStore.open(store.path)


def record(checksum: str, seconds: float) -> CompletionRecord:
    return CompletionRecord(3, 12, 16, checksum, n_invalid=0, seconds=seconds, signature="s")


def test_the_first_record_of_a_shard_stands_and_another_must_agree(s3: ObjectStore) -> None:
    records = ShardRecords(f"{RUN}/shards", "s")
    records.write(record("a", 1.0))
    records.write(record("a", 2.0))
    assert records.complete() == {3: record("a", 1.0)}
    with pytest.raises(StoreError, match=r"shard 3 was computed twice with different .* delete s3://.*00003.json"):
        records.write(record("b", 3.0))
    assert records.complete() == {3: record("a", 1.0)}
    records.withdraw([3, 4])
    records.write(record("b", 3.0))
    assert records.complete() == {3: record("b", 3.0)}


# Folders


def test_a_folder_is_old_new_or_gone_but_never_half_there(s3: ObjectStore) -> None:
    path = location(f"{RUN}/factorization.zarr")

    def write_version(version: int) -> None:
        write_factorization(path, np.full((2, 3), version), np.full((4, 2), version), {})

    def check(version: int) -> None:
        if not is_committed(path):
            with pytest.raises(StoreError, match="does not exist: run `npeff factorize s3://"):
                open_factorization(path)
            return
        stored = open_factorization(path)
        (found,) = {*stored.read_components().flat, *stored.read_coefficients().flat}
        assert found in (version, version - 1)

    write_version(0)
    assert at_every_change(s3, write_version, check) >= 6
    assert is_committed(path)


def test_directions_are_written_one_component_at_a_time(s3: ObjectStore) -> None:
    store = DirectionStore.create(f"{RUN}/directions.zarr", n_components=2, shapes={"a": (2,), "b": ()}, attrs={})
    direction = {"a": np.array([0.6, 0.8], np.float32), "b": np.array(0.0, np.float32)}
    store.write(1, direction)
    np.testing.assert_array_equal(DirectionStore.open(store.path).read(1)["a"], direction["a"])
    with pytest.raises(StoreError, match="corrupt"):
        store.read(0)
    store.export(1, f"{RUN}/direction.safetensors")
    assert location(f"{RUN}/direction.safetensors").is_file()
    remove_directory(store.path)
    assert s3.contents(f"{RUN}/directions.zarr") == {}
    remove_directory(store.path)


# Checkpoints


def commit(store: CheckpointStore, iteration: int) -> None:
    write_checkpoint_array(store.begin(iteration), "coefficients/00000", np.full(9, iteration))
    store.commit(iteration, {"mu": np.array(float(iteration))})


def newest(store: CheckpointStore) -> int:
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.arrays["mu"] == checkpoint.iteration
    assert (checkpoint.read("coefficients/00000") == checkpoint.iteration).all()
    return checkpoint.iteration


def test_a_checkpoint_is_the_former_or_the_new_one_whatever_fails(s3: ObjectStore) -> None:
    store = CheckpointStore(f"{RUN}/checkpoints", config_hash="c")
    assert store.latest() is None
    commit(store, 0)

    def check(iteration: int) -> None:
        fresh = CheckpointStore(f"{RUN}/checkpoints", config_hash="c")
        assert newest(fresh) in (iteration, iteration - 1)

    assert at_every_change(s3, lambda iteration: commit(store, iteration), check) >= 4
    assert len({name.split("/")[0] for name in s3.contents(store.directory.as_posix())}) == store.keep
    assert store.iterations()[-1] == newest(store)


def test_what_a_killed_commands_worker_still_writes_is_no_checkpoint(s3: ObjectStore) -> None:
    killed, next_one = (CheckpointStore(f"{RUN}/checkpoints", config_hash="c") for _ in range(2))
    folder = killed.begin(5)
    commit(next_one, 5)
    write_checkpoint_array(folder, "coefficients/00000", np.zeros(9))
    assert newest(next_one) == 5
    commit(next_one, 6)
    assert all(not name.startswith(folder.name) for name in s3.contents(f"{RUN}/checkpoints"))


def test_a_damaged_checkpoint_is_passed_over(s3: ObjectStore) -> None:
    store = CheckpointStore(f"{RUN}/checkpoints", config_hash="c")
    commit(store, 1)
    commit(store, 2)
    (damaged,) = (key for key in s3.objects() if "000002-" in key and key.endswith("mu.npy"))
    write(location(f"s3://runs/{damaged}"), b"damaged")
    assert newest(store) == 1
    commit(store, 2)
    assert newest(store) == 2
    assert store.iterations() == [1, 2]


# Sums and task files


def test_sums_of_diagonals_are_folded_and_read_in_the_same_order(s3: ObjectStore, tmp_path: Path) -> None:
    contents = []
    for folder in (RUN, str(tmp_path)):
        sums = DiagonalSums(location(f"{folder}/diagonal"), n_shards=3, signature="s")
        for unit in sums.missing():
            sums.write(unit, {"a": np.full(3, 1 / (unit + 3))})
            sums.fold()
        sums.fold(last=True)
        sums.write_mean(location(f"{folder}/mean.safetensors"), 9, {})
        contents.append(location(f"{folder}/mean.safetensors").read_bytes())
        with pytest.raises(StoreError, match="belongs to another run"):
            DiagonalSums(location(f"{folder}/diagonal"), n_shards=3, signature="t").missing()
    assert contents[0] == contents[1]


def test_every_machine_has_the_files_that_one_has_prepared(
    s3: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = location(f"{RUN}/task")
    with pytest.raises(FileNotFoundError), preparing(folder) as made:  # interrupted
        (made / "half.bin").write_bytes((made / "nothing").read_bytes())
    with preparing(folder) as made:
        assert list(made.iterdir()) == []
        (made / "deep").mkdir()
        (made / "deep" / "model.bin").write_bytes(b"weights")
    s3.requests.clear()
    assert (task_files(folder) / "deep/model.bin").read_bytes() == b"weights"
    assert [request.kind for request in s3.requests] == ["LIST"], "it is on this machine already"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    assert (task_files(folder) / "deep/model.bin").read_bytes() == b"weights"
    with preparing(folder) as made:
        assert (made / "deep" / "model.bin").read_bytes() == b"weights"
    remove_directory(folder)
    assert list(task_files(folder).iterdir()) == [], "another run at the same place has nothing of the former one"


# Errors


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (SLOW_DOWN, "too busy: finished work is kept; run the same command again later"),
        (DENIED, "access is denied: allow these credentials"),
        (BROKEN, "internal error: finished work is kept"),
        (("403 Forbidden", "InvalidAccessKeyId"), "credentials are not valid: set valid ones"),
        (("400 Bad Request", "ExpiredToken"), "credentials are not valid: set valid ones"),
        (("301 Moved Permanently", "PermanentRedirect"), "another region: set AWS_DEFAULT_REGION"),
        (("403 Forbidden", "RequestTimeTooSkewed"), "the clock of this machine is wrong"),
        (("403 Forbidden", "QuotaExceeded"), "the bucket is full or a quota is reached: free some space"),
        (("507 Insufficient Storage", "XMinioStorageFull"), "the bucket is full or a quota is reached"),
        (("404 Not Found", "NoSuchBucket"), "the bucket does not exist: create it"),
        (("501 Not Implemented", "NotImplemented"), "choose another run_dir"),
        (("418 I'm a teapot", "Teapot"), "says the test"),
    ],
)
def test_a_refused_request_is_one_clear_line(s3: ObjectStore, answer: Answer, sentence: str) -> None:
    with s3.failing(answer, lambda request: True):
        with pytest.raises(ObjectStoreError, match=sentence) as raised:
            write(location(f"{RUN}/a"), b"")
        assert "s3://runs/some/run/a" in str(raised.value)
        assert "\n" not in str(raised.value)
        with pytest.raises(ObjectStoreError):
            location(f"{RUN}/a").read_bytes()
        with pytest.raises(ObjectStoreError):
            list(location(RUN).iterdir())


def test_what_is_throttled_now_and_then_is_asked_again(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with other_environment(monkeypatch, AWS_MAX_ATTEMPTS="3"), s3.failing(SLOW_DOWN, changes, count=2):
        write(location(f"{RUN}/a"), b"a")
    assert location(f"{RUN}/a").read_bytes() == b"a"


def test_without_credentials_one_line_says_what_to_set(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        other_environment(monkeypatch, AWS_ACCESS_KEY_ID=None),
        pytest.raises(ObjectStoreError, match=r"there are no credentials.*AWS_ACCESS_KEY_ID"),
    ):
        write(location(f"{RUN}/a"), b"")


def test_the_credentials_of_a_profile_are_used(
    s3: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("boto3")
    file = tmp_path / "credentials"
    file.write_text("[work]\naws_access_key_id = testing\naws_secret_access_key = testing\n")
    profile = {"AWS_PROFILE": "work", "AWS_SHARED_CREDENTIALS_FILE": str(file)}
    keys = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    with other_environment(monkeypatch, **keys, **profile):
        write(location(f"{RUN}/a"), b"a")
    assert s3.contents(RUN) == {"a": b"a"}
    with (
        other_environment(monkeypatch, **keys, **profile | {"AWS_PROFILE": "play"}),
        pytest.raises(ObjectStoreError, match=r"there are no credentials .*play.*AWS_PROFILE"),
    ):
        write(location(f"{RUN}/a"), b"")


def test_an_unreachable_endpoint_is_one_clear_line(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        other_environment(monkeypatch, AWS_ENDPOINT_URL="http://127.0.0.1:9"),
        pytest.raises(ObjectStoreError, match=r"cannot reach s3://runs/some/run/a .*AWS_ENDPOINT_URL"),
    ):
        write(location(f"{RUN}/a"), b"")


def test_a_bucket_that_is_not_there_is_told_of(s3: ObjectStore) -> None:
    with pytest.raises(ObjectStoreError, match="bucket does not exist"):
        write(location("s3://elsewhere/run/a"), b"")
    with pytest.raises(ObjectStoreError, match="bucket does not exist"):
        location("s3://elsewhere/run/a").exists()
