"""A disk that is full, or a folder that cannot be written: one line that says so, and everything older as it was."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from npeff.storage.checksums import read_json, write_json_atomically
from npeff.storage.errors import StoreError
from npeff.store.checkpoint import CheckpointStore, write_checkpoint_array
from npeff.store.component_store import open_factorization, write_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import ShardRecords
from npeff.store.tables import read_table, write_table

pytestmark = pytest.mark.process

LARGE = 200_000
ShardArrays = Callable[..., dict[str, np.ndarray]]


@dataclass(frozen=True)
class FullDisk:
    """A folder, and a context in which hardly anything more can be written into it."""

    folder: Path
    full: Callable[[], AbstractContextManager[None]]
    reason: str


@contextmanager
def _file_size_limit() -> Iterator[None]:
    """Files cannot grow beyond 16 KiB: writing fails part of the way, as on a full disk, without any privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _filled(folder: Path) -> Iterator[None]:
    free = shutil.disk_usage(folder).free
    filler = folder / "filler"
    filler.write_bytes(bytes(free - 32 * 1024))
    yield
    filler.unlink()


@pytest.fixture(params=["tmpfs", "file_size_limit"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FullDisk]:
    if request.param == "file_size_limit":
        yield FullDisk(tmp_path, _file_size_limit, "File too large")
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield FullDisk(tmp_path, lambda: _filled(tmp_path), "No space left on device")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def refused(full_disk: FullDisk, write: Callable[[], object]) -> None:
    before = {path: path.read_bytes() for path in full_disk.folder.rglob("*") if path.is_file()}
    with full_disk.full(), pytest.raises(StoreError, match=full_disk.reason) as caught:
        write()
    assert "\n" not in str(caught.value)
    assert str(full_disk.folder) in str(caught.value)
    assert {path: path.read_bytes() for path in full_disk.folder.rglob("*") if path.is_file()} == before


def test_a_shard_that_does_not_fit_leaves_the_others(full_disk: FullDisk, shard_arrays: ShardArrays) -> None:
    dim = 4096
    store = FisherStore.create(
        full_disk.folder / "fishers.zarr", n_examples=20, rank=2, dim=dim, n_classes=3, shard_size=10,
        store_dtype="float32", attrs={},
    )  # fmt: skip
    checksum = store.write_shard(0, shard_arrays(10, dim=dim))
    refused(full_disk, lambda: store.write_shard(1, shard_arrays(10, seed=1, dim=dim)))
    store.read_shard(0, checksum)
    store.read_shard(1, store.write_shard(1, shard_arrays(10, seed=1, dim=dim)))
    assert ShardRecords(full_disk.folder / "shards", "s").complete() == {}


def test_a_factorization_that_does_not_fit_leaves_the_former(full_disk: FullDisk) -> None:
    path = full_disk.folder / "factorization.zarr"
    write_factorization(path, np.ones((1, 2)), np.ones((3, 1)), {})
    refused(full_disk, lambda: write_factorization(path, np.ones((1, 2)), np.ones((LARGE, 1)), {}))
    np.testing.assert_array_equal(open_factorization(path).read_coefficients(), np.ones((3, 1)))


def test_a_direction_that_does_not_fit_leaves_the_others(full_disk: FullDisk) -> None:
    path = full_disk.folder / "directions.zarr"
    store = DirectionStore.create(path, n_components=2, shapes={"w": (LARGE,)}, attrs={})
    store.write(0, {"w": np.ones(LARGE)})
    refused(full_disk, lambda: store.write(1, {"w": np.ones(LARGE)}))
    np.testing.assert_array_equal(store.read(0)["w"], np.ones(LARGE))
    with pytest.raises(StoreError, match="is corrupt"):
        store.read(1)


def test_a_table_that_does_not_fit_leaves_the_former(full_disk: FullDisk) -> None:
    path = full_disk.folder / "coefficients.parquet"
    rng = np.random.default_rng(0)

    def write(n: int) -> None:
        columns = {"example": np.arange(n), "component": np.arange(n), "coefficient": rng.normal(size=n)}
        write_table(path, "coefficients", columns)

    write(3)
    refused(full_disk, lambda: write(LARGE))
    assert read_table(path, "coefficients").num_rows == 3


def test_json_that_does_not_fit_leaves_the_former(full_disk: FullDisk) -> None:
    path = full_disk.folder / "x.json"
    write_json_atomically(path, [1])
    refused(full_disk, lambda: write_json_atomically(path, list(range(LARGE))))


@pytest.mark.parametrize("who", ["driver", "worker"])
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(full_disk: FullDisk, who: str) -> None:
    store = CheckpointStore(full_disk.folder / "checkpoints", config_hash="c")
    store.begin(1)
    store.commit(1, {"mu": np.ones(1)})
    folder = store.begin(2)
    write: dict[str, Callable[[], None]] = {
        "worker": lambda: write_checkpoint_array(folder, "coefficients/00000", np.ones(LARGE)),
        "driver": lambda: store.commit(2, {"mu": np.ones(LARGE)}),
    }
    with full_disk.full(), pytest.raises(StoreError, match=full_disk.reason):
        write[who]()
    checkpoint = store.latest()
    assert checkpoint is not None
    assert checkpoint.iteration == 1
    assert checkpoint.warnings == ()


@contextmanager
def _without_permission(folder: Path) -> Iterator[None]:
    """The body may not use `folder`; root, who may use everything, becomes somebody else for the while."""
    user = os.geteuid()
    folder.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


WRITERS: dict[str, Callable[[Path], object]] = {
    "json": lambda folder: write_json_atomically(folder / "x.json", []),
    "table": lambda folder: write_table(folder / "classes.parquet", "classes", {"class": [1], "name": ["a"]}),
    "fishers": lambda folder: FisherStore.create(
        folder / "f.zarr", n_examples=1, rank=1, dim=1, n_classes=2, shard_size=1, store_dtype="float32", attrs={}
    ),
    "factorization": lambda folder: write_factorization(folder / "f.zarr", np.ones((1, 1)), np.ones((1, 1)), {}),
    "checkpoint": lambda folder: CheckpointStore(folder / "checkpoints", config_hash="c").begin(1),
}
READERS: dict[str, Callable[[Path], object]] = {
    "json": lambda folder: read_json(folder / "x.json"),
    "table": lambda folder: read_table(folder / "classes.parquet", "classes"),
    "fishers": lambda folder: FisherStore.open(folder / "f.zarr"),
    "factorization": lambda folder: open_factorization(folder / "f.zarr"),
    "checkpoint": lambda folder: CheckpointStore(folder / "checkpoints", config_hash="c").latest(),
    "records": lambda folder: ShardRecords(folder / "shards", "s").complete(),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, what: str) -> None:
    with _without_permission(tmp_path), pytest.raises(StoreError) as caught:
        WRITERS[what](tmp_path)
    assert str(caught.value).startswith(f"cannot write {tmp_path}")
    assert str(caught.value).endswith("Permission denied; change its permissions or choose another run_dir")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", READERS)
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, what: str) -> None:
    with _without_permission(tmp_path), pytest.raises(StoreError, match=r"cannot read .*: Permission denied"):
        READERS[what](tmp_path)


def test_a_path_through_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in WRITERS.values():
        with pytest.raises(StoreError, match=r"cannot write .*(Not a directory|File exists)"):
            write(tmp_path / "file")
