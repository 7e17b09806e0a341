from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from npeff.storage.errors import StoreError
from npeff.store.diagonal_store import DiagonalSums
from safetensors import safe_open
from safetensors.numpy import load_file

N_SHARDS = 70


def sums_in(folder: Path, n_shards: int = N_SHARDS, signature: str = "s") -> DiagonalSums:
    return DiagonalSums(folder / "diagonal", n_shards, signature)


def unit_sum(unit: int) -> dict[str, np.ndarray]:
    """Of such different sizes that another order of adding them gives other bits."""
    rng = np.random.default_rng(unit)
    return {name: 10.0 ** rng.uniform(-9, 9, size=shape) for name, shape in (("a.weight", (3, 2)), ("scale", ()))}


def written_mean(sums: DiagonalSums, path: Path) -> bytes:
    sums.fold(last=True)
    sums.write_mean(path, 10, {"labels": "exact"})
    return path.read_bytes()


@pytest.mark.parametrize(("n_shards", "size"), [(1, 1), (16, 1), (31, 1), (32, 2), (35, 2), (64, 4), (1000, 4)])
def test_units_are_consecutive_shards_that_the_number_of_shards_decides(n_shards: int, size: int) -> None:
    sums = sums_in(Path("unused"), n_shards)
    units = [sums.shards(unit) for unit in range(sums.n_units)]
    assert [shard for unit in units for shard in unit] == list(range(n_shards))
    assert {len(unit) for unit in units[:-1]} <= {size}
    assert len(units[-1]) <= size
    with pytest.raises(IndexError, match="is outside"):
        sums.shards(sums.n_units)


def test_the_mean_is_the_sum_in_order_whatever_the_order_they_came_in(tmp_path: Path) -> None:
    expected: dict[str, np.ndarray] = {}
    n_units = sums_in(tmp_path).n_units
    assert n_units == 18
    for unit in range(n_units):
        for name, values in unit_sum(unit).items():
            expected[name] = expected[name] + values if name in expected else values
    contents = []
    for seed in range(4):
        sums, order = sums_in(tmp_path / str(seed)), list(range(n_units))
        if seed:
            random.Random(seed).shuffle(order)
        most = 0
        for unit in order:
            assert unit in sums.missing()
            sums.write(unit, unit_sum(unit))
            sums.fold()
            assert unit not in sums.missing()
            most = max(most, len(list(sums.folder.iterdir())))
        assert most <= 17
        assert sums.missing() == []
        contents.append(written_mean(sums, tmp_path / f"{seed}.safetensors"))
        assert [path.name for path in sums.folder.iterdir()] == ["total.safetensors"]
    assert len(set(contents)) == 1
    found = load_file(tmp_path / "0.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], (values / 10).astype(np.float32))
    with safe_open(tmp_path / "0.safetensors", "numpy") as file:
        metadata = file.metadata()
        assert metadata.pop("checksum")
        assert metadata == {"labels": "exact", "n_examples": "10"}


def test_a_unit_that_outlived_its_adding_up_is_not_counted_twice(tmp_path: Path) -> None:
    contents = []
    for name in ("sound", "killed"):
        sums = sums_in(tmp_path / name, n_shards=3)
        sums.write(0, unit_sum(0))
        sums.fold(last=True)
        if name == "killed":
            sums.write(0, unit_sum(0))  # as if it had not been deleted after the total was replaced
        assert sums.missing() == [1, 2]
        for unit in (1, 2):
            sums.write(unit, unit_sum(unit))
        contents.append(written_mean(sums, tmp_path / f"{name}.safetensors"))
        assert len(list(sums.folder.iterdir())) == 1
    assert contents[0] == contents[1]


def test_a_mean_of_some_units_is_refused(tmp_path: Path) -> None:
    sums = sums_in(tmp_path, n_shards=3)
    sums.write(0, unit_sum(0))
    sums.write(2, unit_sum(2))
    with pytest.raises(StoreError, match="has the sums of 1 of 3 units"):
        written_mean(sums, tmp_path / "mean.safetensors")
    assert not (tmp_path / "mean.safetensors").exists()


@pytest.mark.parametrize("name", ["00001", "total"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_a_damaged_file_is_named_and_can_be_deleted(tmp_path: Path, name: str, keep: float) -> None:
    sums = sums_in(tmp_path, n_shards=3)
    sums.write(0, unit_sum(0))
    sums.fold(last=True)
    sums.write(1, unit_sum(1))
    path = sums.folder / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    for use in (sums.missing, sums.fold):
        with pytest.raises(StoreError, match=rf"{name}\.safetensors is damaged: delete it and run"):
            use()
    path.unlink()
    assert sums.missing() == ([1, 2] if name == "00001" else [0, 2])


def test_sums_of_another_run_are_refused(tmp_path: Path) -> None:
    sums_in(tmp_path).write(3, unit_sum(3))
    with pytest.raises(StoreError, match=r"00003\.safetensors belongs to another run: choose another run_dir"):
        sums_in(tmp_path, signature="other").missing()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sum_that_is_not_finite_is_refused(tmp_path: Path, bad: float) -> None:
    sums = sums_in(tmp_path)
    with pytest.raises(StoreError, match=r"diagonal Fisher of scale over shards 8 to 11 overflows its precision"):
        sums.write(2, {**unit_sum(2), "scale": np.array(bad)})
    assert not sums.folder.exists()
