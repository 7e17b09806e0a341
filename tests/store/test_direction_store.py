from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from npeff.storage.errors import StoreError
from npeff.store.direction_store import DirectionStore

K = 5
SHAPES: dict[str, tuple[int, ...]] = {"conv.weight": (4, 2, 3, 3), "conv.bias": (4,), "scale": ()}


def direction_of(component: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(component)
    return {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def store(tmp_path: Path) -> DirectionStore:
    return DirectionStore.create(tmp_path / "directions.zarr", n_components=K, shapes=SHAPES, attrs={"model": "m"})


def test_directions_are_read_as_they_were_written(store: DirectionStore) -> None:
    for component in reversed(range(K)):
        store.write(component, direction_of(component))
    stored = DirectionStore.open(store.path)
    assert list(stored.arrays) == list(SHAPES)
    assert stored.attrs["model"] == "m"
    for component in range(K):
        for name, values in stored.read(component).items():
            np.testing.assert_array_equal(values, direction_of(component)[name], strict=True)
    for name, array in stored.arrays.items():
        assert array.chunks == (1, *SHAPES[name])
        np.testing.assert_array_equal(array[...], [direction_of(component)[name] for component in range(K)])


def test_half_precision_takes_half_the_disk_and_reads_as_float32(store: DirectionStore, tmp_path: Path) -> None:
    shape = {"weight": (100, 100)}
    unit = np.random.default_rng(0).normal(size=(100, 100))
    unit = {"weight": (unit / np.linalg.norm(unit)).astype(np.float32)}
    sizes = {}
    for dtype in ("float16", "float32"):
        made = DirectionStore.create(tmp_path / dtype, n_components=1, shapes=shape, attrs={}, dtype=dtype)
        made.write(0, unit)
        sizes[dtype] = sum(path.stat().st_size for path in (tmp_path / dtype / "weight" / "c").rglob("*"))
        found = DirectionStore.open(tmp_path / dtype).read(0)["weight"]
        assert found.dtype == np.float32
        assert np.linalg.norm(found - unit["weight"]) < (5e-4 if dtype == "float16" else 1e-9)
    assert sizes["float16"] < 0.6 * sizes["float32"]


def test_components_may_be_written_by_several_at_the_same_time(store: DirectionStore) -> None:
    with ThreadPoolExecutor(K) as pool:
        list(
            pool.map(
                lambda component: DirectionStore.open(store.path).write(component, direction_of(component)), range(K)
            )
        )
    for component in range(K):
        np.testing.assert_array_equal(store.read(component)["conv.weight"], direction_of(component)["conv.weight"])


def test_a_direction_nobody_wrote_is_refused(store: DirectionStore) -> None:
    store.write(3, direction_of(3))
    store.read(3)
    with pytest.raises(StoreError, match=r"conv\.weight of .*directions\.zarr is corrupt: run .npeff check --rec"):
        store.read(2)


def test_creating_again_replaces_the_whole(store: DirectionStore, tmp_path: Path) -> None:
    store.write(0, direction_of(0))
    again = DirectionStore.create(store.path, n_components=2, shapes={"scale": ()}, attrs={})
    assert list(again.arrays) == ["scale"]
    with pytest.raises(StoreError, match="corrupt"):
        again.read(0)
    assert list(tmp_path.iterdir()) == [store.path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": np.zeros(1)}, r"scale must have shape \(\), not \(1,\)"),
        ({"conv.bias": np.array([1, 2, 3, np.nan])}, r"the direction in conv\.bias is not finite"),
        ({"other": np.zeros(2)}, "a direction has the parameters"),
    ],
)
def test_a_direction_that_does_not_fit_is_refused_and_nothing_is_written(
    store: DirectionStore, change: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store.write(0, {**direction_of(0), **change})
    assert {path.name for path in store.path.rglob("*") if path.is_file()} == {"zarr.json"}


def test_a_parameter_left_out_is_refused(store: DirectionStore) -> None:
    with pytest.raises(ValueError, match="a direction has the parameters"):
        store.write(0, {"scale": np.zeros(())})


def test_missing_directions_say_which_command_makes_them(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"does not exist: run `npeff lift .*` first"):
        DirectionStore.open(tmp_path / "directions.zarr")


@pytest.mark.parametrize("component", [-1, K])
def test_a_component_outside_is_refused(store: DirectionStore, component: int) -> None:
    with pytest.raises(IndexError, match=f"component {component} is outside 0..4"):
        store.read(component)
    with pytest.raises(IndexError, match=f"component {component} is outside 0..4"):
        store.write(component, direction_of(0))


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_damage_is_found_and_writing_again_mends_it(store: DirectionStore, damage: str) -> None:
    for component in range(K):
        store.write(component, direction_of(component))
    chunk = store.path / "conv.weight/c/2/0/0/0/0"
    content = chunk.read_bytes()
    if damage == "delete":
        chunk.unlink()
    else:
        flipped = content[:9] + bytes([content[9] ^ 4]) + content[10:]
        chunk.write_bytes({"flip": flipped, "truncate": content[:-8], "empty": b""}[damage])
    store.read(1)
    with pytest.raises(StoreError, match=r"conv\.weight of .*directions\.zarr is corrupt: run .npeff check --rec"):
        store.read(2)
    store.write(2, direction_of(2))
    np.testing.assert_array_equal(store.read(2)["conv.weight"], direction_of(2)["conv.weight"])


def test_sketches_are_stored_beside_the_directions_and_count_in_their_checksum(tmp_path: Path) -> None:
    path = tmp_path / "directions.zarr"
    store = DirectionStore.create(path, n_components=K, shapes=SHAPES, attrs={}, sketch_dim=5)
    sketch = np.arange(5, dtype=np.float64)
    checksums = {1: store.write(1, direction_of(1), sketch)}
    found = DirectionStore.open(path).read_sketches()
    assert found is not None
    np.testing.assert_array_equal(found[1], sketch.astype(np.float32))
    assert np.isnan(np.delete(found, 1, axis=0)).all()
    opened = DirectionStore.open(path, checksums)
    assert opened.read(1).keys() == SHAPES.keys()
    store.write(1, direction_of(1), sketch + 1)
    with pytest.raises(StoreError, match="does not match its checksum"):
        opened.read(1)
    for wrong in (None, sketch[:4], sketch * np.nan):
        with pytest.raises(ValueError, match="a sketch must have 5 finite coordinates"):
            store.write(1, direction_of(1), wrong)
    assert DirectionStore.create(path, n_components=K, shapes=SHAPES, attrs={}).read_sketches() is None
