from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from npeff.storage.bfloat16 import decode_bfloat16, encode_bfloat16
from npeff.storage.errors import StoreError
from npeff.store.fisher_arrays import ARRAY_NAMES, StoreDtype
from npeff.store.fisher_store import FisherStore
from npeff.store.layout import MIN_CHUNK_BYTES

N, SHARD_SIZE, RANK, DIM, N_CLASSES = 23, 10, 2, 48, 3
ShardArrays = Callable[..., dict[str, np.ndarray]]


def create(path: Path, store_dtype: StoreDtype = "float32", **changes: Any) -> FisherStore:
    sizes = {"n_examples": N, "rank": RANK, "dim": DIM, "n_classes": N_CLASSES, "shard_size": SHARD_SIZE}
    attrs = {"sketch": {"kind": "identity"}}
    return FisherStore.create(path, **{**sizes, "store_dtype": store_dtype, "attrs": attrs, **changes})


def fill(store: FisherStore, shard_arrays: ShardArrays) -> dict[int, str]:
    return {
        shard: store.write_shard(shard, shard_arrays(stop - start, seed=shard))
        for shard, (start, stop) in enumerate(store.plan)
    }


@pytest.fixture
def store(tmp_path: Path) -> FisherStore:
    return create(tmp_path / "run" / "fishers.zarr")


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, shard_arrays: ShardArrays) -> tuple[FisherStore, dict[int, str]]:
    store = create(tmp_path_factory.mktemp("filled") / "fishers.zarr", "float16")
    return store, fill(store, shard_arrays)


def stored_as(store_dtype: StoreDtype, factors: np.ndarray) -> np.ndarray:
    if store_dtype == "bfloat16":
        return decode_bfloat16(encode_bfloat16(factors.astype(np.float32)))
    return factors.astype(store_dtype).astype(np.float32)


@pytest.mark.parametrize("store_dtype", ["float16", "bfloat16", "float32"])
def test_shards_are_read_as_they_were_written(
    tmp_path: Path, shard_arrays: ShardArrays, store_dtype: StoreDtype
) -> None:
    checksums = fill(create(tmp_path / "fishers.zarr", store_dtype), shard_arrays)
    store = FisherStore.open(tmp_path / "fishers.zarr")
    for shard, (start, stop) in enumerate(store.plan):
        written = shard_arrays(stop - start, seed=shard)
        read = store.read_shard(shard, checksums[shard])
        assert tuple(read) == ARRAY_NAMES
        assert read["factors"].dtype == np.float32
        np.testing.assert_array_equal(read["factors"], stored_as(store_dtype, written["factors"]))
        for name in ("frobenius_norms", "grams", "ranks", "labels", "valid"):
            np.testing.assert_array_equal(read[name], written[name])
        np.testing.assert_array_equal(read["logits"], written["logits"].astype(np.float32))


def diagonal_arrays(n: int, k: int, n_groups: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(n)
    return {
        "diagonal_norms": rng.uniform(size=n),
        "diagonal_values": -np.sort(-rng.uniform(size=(n, k))),
        "diagonal_indices": rng.integers(1 << 40, size=(n, k)),
        "grouped_diagonal": rng.uniform(size=(n, n_groups)),
    }


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({"top_entries": 7, "n_groups": 4}, {"norms", "values", "indices", "grouped"}),
        ({"top_entries": 7}, {"norms", "values", "indices"}),
        ({"n_groups": 4}, {"norms", "grouped"}),
        ({}, set()),
    ],
)
def test_diagonals_are_there_where_they_are_asked_for(
    tmp_path: Path, shard_arrays: ShardArrays, sizes: dict[str, int], names: set[str]
) -> None:
    create(tmp_path / "fishers.zarr", "float16", **sizes)
    store = FisherStore.open(tmp_path / "fishers.zarr")
    found = [name for name in store.array_names if "diagonal" in name]
    assert {name.replace("diagonal", "").strip("_") for name in found} == names
    asked = {name: values for name, values in diagonal_arrays(10, 7, 4).items() if name in found}
    checksum = store.write_shard(0, {**shard_arrays(10), **asked})
    read = store.read_shard(0, checksum)
    for name, values in asked.items():
        stored = values.astype({"norms": np.float64, "indices": np.int64}.get(name.split("_")[1], np.float32))
        assert read[name].dtype == stored.dtype
        np.testing.assert_array_equal(read[name], stored)
    for name in asked:
        changed = {**asked, name: asked[name] + 1}
        assert store.write_shard(0, {**shard_arrays(10), **changed}) != checksum
        with pytest.raises(StoreError, match="needs the arrays"):
            store.write_shard(0, {**shard_arrays(10), **{other: asked[other] for other in asked if other != name}})
        if name != "diagonal_indices":
            with pytest.raises(StoreError, match=f"{name} of shard 0 of .* are not finite"):
                store.write_shard(0, {**shard_arrays(10), **asked, name: asked[name] * np.nan})
    if not asked:
        with pytest.raises(StoreError, match="needs the arrays"):
            store.write_shard(0, {**shard_arrays(10), **diagonal_arrays(10, 7, 4)})


def test_plain_zarr_reads_the_store(filled: tuple[FisherStore, dict[int, str]], shard_arrays: ShardArrays) -> None:
    store, _ = filled
    group = zarr.open_group(store.path, mode="r")
    assert group.attrs["schema_version"] == 3
    assert group.attrs["normalised"] is True
    assert group.attrs["sketch"] == {"kind": "identity"}
    factors = group["factors"]
    assert isinstance(factors, zarr.Array)
    assert (factors.shape, factors.dtype, factors.shards) == ((N, RANK, DIM), np.float16, (SHARD_SIZE, RANK, DIM))
    np.testing.assert_array_equal(factors[10:20], shard_arrays(10, seed=1)["factors"].astype(np.float16))


def test_the_checksum_is_of_the_stored_numbers(tmp_path: Path, shard_arrays: ShardArrays) -> None:
    arrays = shard_arrays(SHARD_SIZE)
    rounded = {**arrays, "factors": stored_as("bfloat16", arrays["factors"])}
    checksums = [
        create(tmp_path / str(i), "bfloat16").write_shard(0, version) for i, version in enumerate((arrays, rounded))
    ]
    assert checksums[0] == checksums[1]


def test_shards_may_be_written_in_any_order_at_the_same_time(tmp_path: Path, shard_arrays: ShardArrays) -> None:
    stores = [create(tmp_path / name, n_examples=80) for name in ("one by one", "at once")]
    expected = fill(stores[0], shard_arrays)
    with ThreadPoolExecutor(4) as pool:
        shards = list(reversed(range(8)))
        checksums = list(
            pool.map(lambda i: FisherStore.open(stores[1].path).write_shard(i, shard_arrays(10, i)), shards)
        )
    assert dict(zip(shards, checksums, strict=True)) == expected
    for shard, checksum in expected.items():
        stores[1].read_shard(shard, checksum)


def test_rows_come_in_the_order_asked_for(filled: tuple[FisherStore, dict[int, str]]) -> None:
    store, checksums = filled
    whole = [store.read_shard(shard, checksum) for shard, checksum in checksums.items()]
    for indices in ([22, 3, 3, 11, 0], list(range(N)), [5], [19, 9, 0, 2, 10]):
        rows = store.read_rows(indices)
        for name in ARRAY_NAMES:
            np.testing.assert_array_equal(rows[name], np.concatenate([shard[name] for shard in whole])[indices])
    none = store.read_rows([], ["factors", "labels"])
    assert none["factors"].shape == (0, RANK, DIM)
    assert none["labels"].shape == (0,)


@pytest.mark.parametrize("indices", [[0, N], [-1]])
def test_rows_outside_are_refused(filled: tuple[FisherStore, dict[int, str]], indices: list[int]) -> None:
    with pytest.raises(IndexError, match=r"are not all in 0\.\.22"):
        filled[0].read_rows(indices)


def test_a_shard_without_a_valid_example_is_stored_like_any_other(
    store: FisherStore, shard_arrays: ShardArrays
) -> None:
    arrays = shard_arrays(SHARD_SIZE)
    empty = {name: np.zeros_like(values) for name, values in arrays.items()}
    checksum = store.write_shard(0, {**empty, "logits": np.full((SHARD_SIZE, N_CLASSES), np.nan)})
    read = store.read_shard(0, checksum)
    assert not read["valid"].any()
    assert np.isnan(read["logits"]).all()
    for name in ARRAY_NAMES:
        assert any(path.relative_to(store.path).parts[0] == name for path in all_shard_files(store))


@pytest.mark.parametrize("name", ARRAY_NAMES)
def test_a_shard_nobody_wrote_is_missing_and_not_zeros(
    store: FisherStore, shard_arrays: ShardArrays, name: str
) -> None:
    store.write_shard(0, shard_arrays(SHARD_SIZE))
    for read in (lambda: store.read_shard(2), lambda: store.read_rows([3, 21], [name])):
        with pytest.raises(
            StoreError, match=r"shard 2 of .*fishers\.zarr has no \w+: delete .*run/shards/00002\.json and run"
        ):
            read()


def all_shard_files(store: FisherStore) -> list[Path]:
    return sorted(path for path in store.path.glob("*/c/**/*") if path.is_file())


def shard_of(store: FisherStore, path: Path) -> int:
    return int(path.relative_to(store.path).parts[2])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_even_without_the_checksum(
    filled: tuple[FisherStore, dict[int, str]], data: st.DataObject
) -> None:
    store, _ = filled
    path = data.draw(st.sampled_from(all_shard_files(store)))
    intact = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(intact) - 1))
    flipped = bytearray(intact)
    flipped[bit // 8] ^= 1 << bit % 8
    shard = shard_of(store, path)
    try:
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match=f"shard {shard} of .* is corrupt in .*delete .*{shard:05d}.json"):
            store.read_shard(shard)
    finally:
        path.write_bytes(intact)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_truncation_is_found_even_without_the_checksum(
    filled: tuple[FisherStore, dict[int, str]], data: st.DataObject
) -> None:
    store, _ = filled
    path = data.draw(st.sampled_from(all_shard_files(store)))
    intact = path.read_bytes()
    length = data.draw(st.integers(0, len(intact) - 1))
    shard = shard_of(store, path)
    try:
        path.write_bytes(intact[:length])
        with pytest.raises(StoreError, match=f"shard {shard} of .* (has no|is corrupt in) .*delete .*{shard:05d}.json"):
            store.read_shard(shard)
    finally:
        path.write_bytes(intact)


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory, shard_arrays: ShardArrays) -> tuple[FisherStore, np.ndarray]:
    """A shard of five chunks, of two examples each, and its factors."""
    store = create(tmp_path_factory.mktemp("chunked") / "fishers.zarr", n_examples=12, dim=MIN_CHUNK_BYTES // 16)
    arrays = shard_arrays(10, dim=store.dim)
    store.write_shard(0, arrays)
    assert store.path.joinpath("factors/c/0/0/0").stat().st_size > 5 * MIN_CHUNK_BYTES
    return store, arrays["factors"].astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rows_of_a_damaged_shard_are_right_or_refused(
    chunked: tuple[FisherStore, np.ndarray], data: st.DataObject
) -> None:
    """Rows may lie in a chunk that is intact."""
    store, factors = chunked
    path = store.path / "factors/c/0/0/0"
    intact = path.read_bytes()
    position = data.draw(st.integers(0, len(intact) - 1))
    row = data.draw(st.integers(0, 9))
    truncate = data.draw(st.booleans())
    try:
        path.write_bytes(
            intact[:position] + (b"" if truncate else bytes([intact[position] ^ 1]) + intact[position + 1 :])
        )
        read = store.read_rows([row], ["factors"])["factors"]
    except StoreError:
        return
    finally:
        path.write_bytes(intact)
    np.testing.assert_array_equal(read, factors[[row]])


@pytest.mark.parametrize("name", ARRAY_NAMES)
def test_a_deleted_file_is_found(store: FisherStore, shard_arrays: ShardArrays, name: str) -> None:
    fill(store, shard_arrays)
    next(path for path in all_shard_files(store) if path.relative_to(store.path).parts[:3] == (name, "c", "1")).unlink()
    with pytest.raises(StoreError, match=f"shard 1 of .* has no {name}"):
        store.read_shard(1)
    store.read_shard(0)


def test_a_shard_with_other_numbers_does_not_match_its_checksum(store: FisherStore, shard_arrays: ShardArrays) -> None:
    checksum = store.write_shard(0, shard_arrays(SHARD_SIZE, seed=1))
    store.write_shard(0, shard_arrays(SHARD_SIZE, seed=2))
    with pytest.raises(StoreError, match=r"shard 0 of .* does not match its checksum"):
        store.read_shard(0, checksum)


@pytest.mark.parametrize("shard", [0, 2], ids=["full shard", "last shard, in part"])
def test_a_corrupt_shard_can_be_written_again(store: FisherStore, shard_arrays: ShardArrays, shard: int) -> None:
    checksums = fill(store, shard_arrays)
    for path in all_shard_files(store):
        if shard_of(store, path) == shard:
            path.write_bytes(path.read_bytes()[:-3] + b"???")
    start, stop = store.plan.bounds(shard)
    assert store.write_shard(shard, shard_arrays(stop - start, seed=shard)) == checksums[shard]
    store.read_shard(shard, checksums[shard])


def test_litter_of_a_killed_writer_goes_when_its_shard_is_written(
    store: FisherStore, shard_arrays: ShardArrays
) -> None:
    fill(store, shard_arrays)
    for path in all_shard_files(store):
        path.with_name(f"{path.name}.0123abcd.partial").write_bytes(b"litter")
    fill(store, shard_arrays)
    assert not list(store.path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("name", "replace", "message"),
    [
        ("factors", lambda a: a[:-1], r"factors of shard 0 .* must have shape \(10, 2, 48\), not \(9, 2, 48\)"),
        ("factors", lambda a: a[..., :-1], "must have shape"),
        ("factors", lambda a: np.where(a > 2, np.nan, a), "factors of .* are not finite: mark such examples"),
        ("factors", lambda a: a.astype(complex), "factors of .* must be float16, not complex128"),
        ("factors", lambda a: 1e6 * a, "factors of .* do not fit float16: set fishers.store_dtype to float32"),
        ("grams", lambda a: a + np.inf, "grams of .* are not finite"),
        ("frobenius_norms", lambda a: a * np.nan, "frobenius_norms of .* are not finite"),
        ("logits", lambda a: a * np.nan, "logits of .* are not finite"),
        ("ranks", lambda a: a + 1, r"ranks of .* are not all in 0\.\.2"),
        ("labels", lambda a: a + 0.5, "labels of .* must be int64, not float64"),
        ("valid", lambda a: a.astype(int), "valid of .* must be bool"),
    ],
)  # fmt: skip
def test_a_shard_that_is_not_right_is_refused_and_nothing_is_written(
    tmp_path: Path,
    shard_arrays: ShardArrays,
    name: str,
    replace: Callable[[np.ndarray], np.ndarray],
    message: str,
) -> None:
    store = create(tmp_path / "fishers.zarr", "float16")
    arrays = shard_arrays(SHARD_SIZE)
    with pytest.raises(StoreError, match=message):
        store.write_shard(0, {**arrays, name: replace(arrays[name])})
    assert not all_shard_files(store)


def test_missing_and_unknown_arrays_are_refused(store: FisherStore, shard_arrays: ShardArrays) -> None:
    arrays = shard_arrays(SHARD_SIZE)
    with pytest.raises(StoreError, match="needs the arrays"):
        store.write_shard(0, {**arrays, "more": arrays["ranks"]})
    with pytest.raises(StoreError, match="needs the arrays"):
        store.write_shard(0, {name: arrays[name] for name in ARRAY_NAMES[1:]})


def test_an_existing_store_is_not_overwritten(store: FisherStore, shard_arrays: ShardArrays) -> None:
    checksums = fill(store, shard_arrays)
    with pytest.raises(StoreError, match="exists already: open it to resume"):
        create(store.path)
    store.read_shard(2, checksums[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_examples": 0}, "there are no examples"),
        ({"top_entries": 0}, "cannot have top_entries = 0"),
        ({"rank": 0, "dim": -1}, "cannot have rank = 0, dim = -1"),
    ],
)
def test_impossible_sizes_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        create(tmp_path / "fishers.zarr", **changes)
    assert not list(tmp_path.iterdir())


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="store_dtype 'int8' is unknown: choose float16, bfloat16, float32"):
        create(tmp_path / "fishers.zarr", "int8")  # type: ignore[arg-type]


def test_attrs_that_are_not_json_leave_nothing_behind(tmp_path: Path) -> None:
    for attrs in ({"loss": float("nan")}, {"rank": 3}):
        with pytest.raises(ValueError, match=r"JSON|may not redefine \['rank'\]"):
            create(tmp_path / "fishers.zarr", attrs=attrs)
    assert not list(tmp_path.iterdir())


def test_a_missing_store_is_not_created_by_opening_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"fishers\.zarr does not exist: run `npeff fishers .*` first"):
        FisherStore.open(tmp_path / "fishers.zarr")
    assert not list(tmp_path.iterdir())


def test_something_else_is_not_taken_for_a_store(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "fishers.zarr")
    with pytest.raises(StoreError, match="is not a Fisher store"):
        FisherStore.open(tmp_path / "fishers.zarr")


def test_another_schema_version_is_refused(store: FisherStore) -> None:
    zarr.open_group(store.path).attrs["schema_version"] = 99
    with pytest.raises(StoreError, match="schema version 99, but this program reads version 3"):
        FisherStore.open(store.path)


@pytest.mark.parametrize("array", ["", *ARRAY_NAMES])
@pytest.mark.parametrize("keep", [0.0, 0.5, None], ids=["empty", "half", "deleted"])
def test_damaged_metadata_are_found_when_opening(store: FisherStore, array: str, keep: float | None) -> None:
    path = store.path / array / "zarr.json"
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(StoreError, match=r"fishers\.zarr") as error:
        FisherStore.open(store.path)
    assert error.value.path == path
    assert error.value.problem == f"{path} is damaged"
