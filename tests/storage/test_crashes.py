"""What is committed survives SIGKILL at any point of writing, and the next writer needs no help."""

from __future__ import annotations

import importlib.util
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from npeff.storage.errors import StoreError
from npeff.store.checkpoint import Checkpoint, CheckpointStore
from npeff.store.fisher_arrays import ARRAY_NAMES
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords
from npeff.store.tables import read_table

pytestmark = pytest.mark.process

SCRIPT = Path(__file__).with_name("crash_points.py")


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crash_points", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


crash_points = load_script()


def crashed(scenario: str, tmp_path: Path, at_least: int) -> list[Path]:
    """The folders of writers that died at one change each, in order, and of one that survived."""
    subprocess.run([sys.executable, str(SCRIPT), scenario, str(tmp_path)], check=True, timeout=120)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) > at_least, "the writer was not killed as often as it changes the disk"
    return folders


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_store_is_created_whole_or_not_at_all(tmp_path: Path) -> None:
    *dead, alive = crashed("create", tmp_path, at_least=8)
    for folder in dead:
        if (folder / "fishers.zarr").exists():
            FisherStore.open(folder / "fishers.zarr")
        else:
            crash_points.create_fishers(folder)
        assert files_of(folder) == files_of(alive)


def test_a_killed_writer_leaves_whole_shards_or_none(tmp_path: Path) -> None:
    *dead, alive = crashed("shard", tmp_path, at_least=3 * len(ARRAY_NAMES))
    expected = files_of(alive)
    assert sorted(ShardRecords(alive / "shards", "s").complete()) == [0, 2]
    for folder in dead:
        for name, content in files_of(folder).items():
            assert name.endswith(".partial") or content == expected[name]
        complete = ShardRecords(folder / "shards", "s").complete()
        assert 0 in complete
        store = FisherStore.open(folder / "fishers.zarr")
        for shard, record in complete.items():
            store.read_shard(shard, record.checksum)
        if 2 not in complete:
            crash_points.write_shard(folder, 2)
        assert files_of(folder) == expected


def test_a_killed_commit_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    *dead, alive = crashed("checkpoint", tmp_path, at_least=8)
    expected = files_of(alive)
    iterations = []
    for folder in dead:
        checkpoint = CheckpointStore(folder / "checkpoints", config_hash="c").latest()
        assert isinstance(checkpoint, Checkpoint)
        assert checkpoint.warnings == ()
        assert checkpoint.arrays["mu"] == checkpoint.iteration
        assert (checkpoint.read("coefficients/00000") == checkpoint.iteration).all()
        iterations.append(checkpoint.iteration)
        crash_points.commit_checkpoint(folder, 3)
        assert files_of(folder) == expected
    assert iterations == sorted(iterations)
    assert set(iterations) == {2, 3}


@pytest.mark.slow
def test_a_killed_replacement_leaves_the_former_folder_or_the_new_one(tmp_path: Path) -> None:
    *dead, alive = crashed("factorization", tmp_path, at_least=8)
    versions = []
    for folder in dead:
        try:
            versions.append(crash_points.read_version(folder))
        except StoreError:  # between the two renames: the former folder lies beside, and the next writer begins with it
            assert {path.name for path in folder.iterdir()} == {"factorization.zarr.old", "factorization.zarr.partial"}
            (folder / "factorization.zarr.old").rename(folder / "factorization.zarr")
            assert crash_points.read_version(folder) == 1
            (folder / "factorization.zarr").rename(folder / "factorization.zarr.old")
        crash_points.write_version(folder, 2)
        assert files_of(folder) == files_of(alive)
    assert versions == sorted(versions)
    assert len(versions) >= len(dead) - 1


def test_a_killed_table_leaves_the_former_one_or_the_new_one(tmp_path: Path) -> None:
    *dead, alive = crashed("table", tmp_path, at_least=1)
    for folder in dead:
        assert read_table(folder / "classes.parquet", "classes")["class"].to_pylist() in ([1], [2])
        crash_points.write_classes(folder, 2)
        assert files_of(folder) == files_of(alive)


def test_killed_sums_go_on_to_the_same_mean(tmp_path: Path) -> None:
    *dead, alive = crashed("sums", tmp_path, at_least=10)
    for folder in dead:
        crash_points.finish_sums(folder)
        assert files_of(folder) == files_of(alive)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import crash_points
folder = Path(sys.argv[1])
crash_points.create_fishers(folder, n_examples=16 * 64, shard_size=64, dim=16384)
print("begin", flush=True)
for shard in range(16):
    crash_points.write_shard(folder, shard)
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_shards_are_whole_or_none_when_killed_in_the_middle_of_a_write(tmp_path: Path, seed: int) -> None:
    """Two megabytes a shard: here the kill may fall within the writing of bytes, not between changes of names."""
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(SCRIPT.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begin\n"
        time.sleep(random.Random(seed).uniform(0.02, 0.4))
        writer.kill()
    store = FisherStore.open(tmp_path / "fishers.zarr")
    complete = ShardRecords(tmp_path / "shards", "s").complete()
    for shard, (start, stop) in enumerate(store.plan):
        if (store.path / f"factors/c/{shard}/0/0").exists():
            expected = crash_points.shard_arrays(stop - start, shard, store.dim)["factors"].astype(np.float16)
            read = store.read_rows(np.arange(start, stop), ["factors"])["factors"]
            np.testing.assert_array_equal(read, expected.astype(np.float32))
        if shard in complete:
            store.read_shard(shard, complete[shard].checksum)
