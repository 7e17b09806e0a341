from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from npeff.storage.errors import StoreError
from npeff.store.fit_store import FitStore

COMPONENTS_KD = np.random.default_rng(0).standard_normal((3, 5))


def test_a_fit_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = FitStore(tmp_path / "fits", "a")
    assert not store.has("x")
    store.write("x", COMPONENTS_KD, {"explained": 0.5})
    found = FitStore(tmp_path / "fits", "a").read("x")
    np.testing.assert_array_equal(found.components_KD, COMPONENTS_KD.astype(np.float32))
    assert found.facts == {"explained": 0.5}
    store.write("x", 2 * COMPONENTS_KD, {})
    assert store.read("x").facts == {}


def _forget_record(folder: Path) -> None:
    (folder / "x.json").unlink()


def _forget_components(folder: Path) -> None:
    (folder / "x.npy").unlink()


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "x.npy").read_bytes())
    content[-1] ^= 1
    (folder / "x.npy").write_bytes(content)


def _cut(folder: Path) -> None:
    (folder / "x.npy").write_bytes((folder / "x.npy").read_bytes()[:-7])


def _garble_record(folder: Path) -> None:
    (folder / "x.json").write_text("{")


@pytest.mark.parametrize("damage", [_forget_record, _forget_components, _flip_a_bit, _cut, _garble_record])
def test_a_fit_that_is_not_whole_is_none(tmp_path: Path, damage) -> None:
    store = FitStore(tmp_path, "a")
    store.write("x", COMPONENTS_KD, {})
    damage(tmp_path)
    assert not store.has("x")
    with pytest.raises(StoreError, match="run the same command again"):
        store.read("x")
    store.write("x", COMPONENTS_KD, {})
    assert store.has("x")


def test_a_fit_of_another_signature_is_none(tmp_path: Path) -> None:
    FitStore(tmp_path, "a").write("x", COMPONENTS_KD, {})
    assert not FitStore(tmp_path, "b").has("x")
