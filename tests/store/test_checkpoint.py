from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from npeff.storage.checksums import file_checksum, read_json, write_json_atomically
from npeff.storage.errors import StoreError
from npeff.store.checkpoint import Checkpoint, CheckpointStore, write_checkpoint_array

CONFIG_HASH = "0123abcd"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2, config_hash=CONFIG_HASH)


def commit(store: CheckpointStore, iteration: int) -> None:
    folder = store.begin(iteration)
    for shard in (0, 7):
        write_checkpoint_array(folder, f"coefficients/{shard:05d}", np.full((4, 3), iteration + shard, np.float32))
    store.commit(iteration, state_of(iteration))


def state_of(iteration: int) -> dict[str, np.ndarray]:
    return {"components": np.linspace(0, iteration, 6).reshape(2, 3), "mu": np.array(iteration / 7)}


def latest(store: CheckpointStore) -> Checkpoint:
    checkpoint = store.latest()
    assert checkpoint is not None
    return checkpoint


def folders(store: CheckpointStore) -> list[str]:
    return sorted(folder.name for folder in store.directory.iterdir())


def damage(store: CheckpointStore, iteration: int, name: str = "components.npy") -> None:
    path = store.directory / f"{iteration:06d}" / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_is_read_as_it_was_written(store: CheckpointStore) -> None:
    assert store.latest() is None
    commit(store, 120)
    checkpoint = latest(store)
    assert checkpoint.iteration == 120
    assert checkpoint.path == store.directory / "000120"
    assert checkpoint.warnings == ()
    assert checkpoint.names == ("coefficients/00000", "coefficients/00007", "components", "mu")
    assert set(checkpoint.arrays) == {"components", "mu"}
    for name, array in state_of(120).items():
        np.testing.assert_array_equal(checkpoint.arrays[name], array, strict=True)
    np.testing.assert_array_equal(checkpoint.read("coefficients/00007"), np.full((4, 3), 127, np.float32), strict=True)
    with pytest.raises(KeyError, match="coefficients/00001"):
        checkpoint.read("coefficients/00001")


def test_the_newest_few_are_kept(store: CheckpointStore) -> None:
    for iteration in (5, 10, 999_999, 1_000_000):
        commit(store, iteration)
    assert folders(store) == ["1000000", "999999"]
    assert latest(store).iteration == 1_000_000


def test_what_was_begun_is_no_checkpoint_and_goes_with_the_next_begin(store: CheckpointStore) -> None:
    commit(store, 5)
    write_checkpoint_array(store.begin(10), "mu", np.array(1.0))
    assert latest(store).iteration == 5
    folder = store.begin(15)
    assert not list(folder.iterdir())
    assert folders(store) == ["000005", "000015.partial"]


@pytest.mark.parametrize("name", ["components.npy", "coefficients/00007.npy"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(store: CheckpointStore, name: str, how: str) -> None:
    commit(store, 5)
    commit(store, 10)
    path = store.directory / "000010" / name
    if how == "flip":
        damage(store, 10, name)
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    checkpoint = latest(store)
    assert checkpoint.iteration == 5
    assert len(checkpoint.warnings) == 1
    assert "000010 is damaged" in checkpoint.warnings[0]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"schema_version": 1}'])
def test_a_damaged_manifest_damages_its_checkpoint(store: CheckpointStore, content: str) -> None:
    commit(store, 5)
    commit(store, 10)
    (store.directory / "000010" / "MANIFEST.json").write_text(content)
    checkpoint = latest(store)
    assert checkpoint.iteration == 5
    assert "MANIFEST.json is missing or unreadable" in checkpoint.warnings[0]


def test_starting_over_in_silence_is_refused_when_all_are_damaged(store: CheckpointStore) -> None:
    commit(store, 5)
    commit(store, 10)
    damage(store, 5)
    damage(store, 10)
    with pytest.raises(StoreError, match=r"all checkpoints in .* are damaged: delete it and run the same command"):
        store.latest()


def test_a_run_that_fell_back_leaves_the_damaged_checkpoint_behind(store: CheckpointStore) -> None:
    commit(store, 5)
    commit(store, 10)
    damage(store, 10)
    commit(store, 8)
    assert folders(store) == ["000005", "000008"]
    assert latest(store).iteration == 8


def test_the_same_iteration_can_be_committed_again(store: CheckpointStore) -> None:
    commit(store, 5)
    commit(store, 10)
    damage(store, 10)
    commit(store, 10)
    assert folders(store) == ["000005", "000010"]
    assert latest(store).warnings == ()


def test_another_configuration_is_refused(store: CheckpointStore) -> None:
    commit(store, 5)
    with pytest.raises(StoreError, match=r"000005 has another configuration .*choose another run_dir, or delete"):
        CheckpointStore(store.directory, config_hash="other").latest()


def test_an_array_a_manifest_does_not_name_is_not_read(store: CheckpointStore) -> None:
    commit(store, 5)
    np.save(store.directory / "000005" / "late.npy", np.zeros(3))
    assert "late" not in latest(store).names


def test_pickled_arrays_are_neither_written_nor_read(store: CheckpointStore) -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        write_checkpoint_array(store.begin(5), "state", np.array([{}]))
    commit(store, 5)
    commit(store, 10)
    path = store.directory / "000010"
    np.save(path / "mu.npy", np.array([{}]), allow_pickle=True)
    manifest = read_json(path / "MANIFEST.json")
    manifest["checksums"]["mu"] = file_checksum(path / "mu.npy")
    write_json_atomically(path / "MANIFEST.json", manifest)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        store.latest()


@pytest.mark.parametrize("name", ["", "../up", "a/b/c", "/root", "a.b", "a/"])
def test_names_cannot_leave_the_checkpoint(store: CheckpointStore, name: str) -> None:
    with pytest.raises(ValueError, match="is not a valid array name"):
        write_checkpoint_array(store.begin(5), name, np.zeros(1))


def test_a_worker_whose_folder_is_gone_is_told(store: CheckpointStore) -> None:
    folder = store.begin(5)
    store.begin(10)
    for name in ("coefficients/00000", "mu"):
        with pytest.raises(StoreError, match=r"cannot write .*000005\.partial.*No such file"):
            write_checkpoint_array(folder, name, np.zeros(1))


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        CheckpointStore(tmp_path, keep=0, config_hash=CONFIG_HASH)
