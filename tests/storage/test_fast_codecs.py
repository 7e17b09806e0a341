"""The codecs of zarrs write and read the same bytes as those of Zarr, and find the same damage."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from npeff.storage import fast_codecs
from npeff.storage.errors import StoreError
from npeff.storage.location import location
from npeff.store.component_store import open_factorization, write_factorization
from npeff.store.fisher_arrays import StoreDtype
from npeff.store.fisher_store import FisherStore
from object_store import ObjectStore

pytest.importorskip("zarrs", reason="the extra `fast` is not installed")

Make = Callable[..., dict[str, np.ndarray]]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast_codecs.VARIABLE, "1")


def create(path: Path, dtype: StoreDtype = "float16", n_examples: int = 10, dim: int = 48) -> FisherStore:
    return FisherStore.create(
        path, n_examples=n_examples, rank=2, dim=dim, n_classes=3, shard_size=4, store_dtype=dtype, attrs={}
    )


def files(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [
        *((dtype, 48) for dtype in ("float16", "bfloat16", "float32")),
        ("float16", 200_000),
        *(pytest.param(dtype, 200_000, marks=pytest.mark.slow) for dtype in ("bfloat16", "float32")),
    ],
)
def test_shards_have_the_same_bytes_and_are_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_arrays: Make, dtype: StoreDtype, dim: int
) -> None:
    shards = [shard_arrays(n, seed, dim) for seed, n in enumerate((4, 4, 2))]
    for arrays in shards[1:2]:  # a shard without valid examples: chunks of fill values
        arrays["valid"][:] = False
        for name in ("factors", "grams", "frobenius_norms"):
            arrays[name][:] = 0
    for folder, value in (("zarr", "0"), ("zarrs", "1")):
        monkeypatch.setenv(fast_codecs.VARIABLE, value)
        store = create(tmp_path / folder, dtype, dim=dim)
        for shard, arrays in enumerate(shards):
            store.write_shard(shard, arrays)
    assert files(tmp_path / "zarr") == files(tmp_path / "zarrs")
    monkeypatch.setenv(fast_codecs.VARIABLE, "0")
    slow = FisherStore.open(tmp_path / "zarr")
    monkeypatch.setenv(fast_codecs.VARIABLE, "1")
    quick = FisherStore.open(tmp_path / "zarr")
    assert type(quick._arrays["factors"].async_array.codec_pipeline).__name__ == "Pipeline"
    for shard in range(3):
        ours, theirs = slow.read_shard(shard), quick.read_shard(shard)
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], strict=True)
    some = [9, 0, 3]
    for name, values in slow.read_rows(some).items():
        np.testing.assert_array_equal(values, quick.read_rows(some)[name], strict=True)


def test_damage_is_found_in_every_chunk(tmp_path: Path, fast: None, shard_arrays: Make) -> None:
    store = create(tmp_path / "fishers.zarr", n_examples=4)
    store.write_shard(0, shard_arrays(4))
    for name in store.array_names:
        (file,) = (path for path in (store.path / name).rglob("*") if path.is_file() and path.name != "zarr.json")
        content = file.read_bytes()
        for place in (0, len(content) // 2, len(content) - 1):
            damaged = bytearray(content)
            damaged[place] ^= 4
            file.write_bytes(damaged)
            with pytest.raises(StoreError, match="shard 0"):
                store.read_shard(0)
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(StoreError, match="shard 0"):
            store.read_shard(0)
        file.unlink()
        with pytest.raises(StoreError, match=f"has no {name}"):
            store.read_shard(0)
        file.write_bytes(content)
    store.read_shard(0)


def test_a_shard_that_cannot_be_written_is_one_line(tmp_path: Path, fast: None, shard_arrays: Make) -> None:
    store = create(tmp_path / "fishers.zarr", n_examples=4)
    (store.path / "factors" / "c").write_text("a file in the way")
    with pytest.raises(StoreError, match=r"cannot write .*fishers\.zarr") as raised:
        store.write_shard(0, shard_arrays(4))
    assert "\n" not in str(raised.value)


def test_a_factorization_is_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_factorization(tmp_path / "f.zarr", np.ones((3, 5)), np.eye(4, 3, dtype=np.float32), {})
    monkeypatch.setenv(fast_codecs.VARIABLE, "1")
    stored = open_factorization(tmp_path / "f.zarr")
    np.testing.assert_array_equal(stored.read_coefficients(), np.eye(4, 3, dtype=np.float32))
    np.testing.assert_array_equal(stored.coefficients[2], np.eye(4, 3, dtype=np.float32)[2])


def test_an_object_store_is_read_by_zarr_itself(s3: ObjectStore, fast: None, shard_arrays: Make) -> None:
    store = create(location("s3://runs/fishers.zarr"))
    checksum = store.write_shard(0, shard_arrays(4))
    np.testing.assert_array_equal(store.read_shard(0, checksum)["labels"], shard_arrays(4)["labels"])


def test_without_zarrs_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    fast_codecs._pipeline.cache_clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "zarrs" else found(name, *more)
    )
    with pytest.raises(StoreError, match=r"NPEFF_ZARRS=1 needs zarrs.*pip install 'npeff-pipeline\[fast\]'"):
        create(tmp_path / "fishers.zarr")
