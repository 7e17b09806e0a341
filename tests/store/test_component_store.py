from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from npeff.storage.checksums import checksum
from npeff.storage.errors import StoreError
from npeff.store import component_store
from npeff.store.coefficient_rows import StackedRows, columns_of
from npeff.store.component_store import open_factorization, write_factorization

N, K, D = 3001, 50, 7


@pytest.fixture
def factorization() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    coefficients_NK = rng.uniform(size=(N, K)).astype(np.float32)
    coefficients_NK[[0, 2999]] = np.nan
    return rng.normal(size=(K, D)), coefficients_NK


def test_a_factorization_is_read_as_it_was_written(
    tmp_path: Path, factorization: tuple[np.ndarray, np.ndarray]
) -> None:
    write_factorization(tmp_path / "factorization.zarr", *factorization, {"loss": 1.5})
    stored = open_factorization(tmp_path / "factorization.zarr")
    np.testing.assert_array_equal(stored.read_components(), factorization[0])
    np.testing.assert_array_equal(stored.read_coefficients(), factorization[1])
    np.testing.assert_array_equal(stored.coefficients[2998:3000, :3], factorization[1][2998:3000, :3])
    assert stored.coefficients.nchunks > 1
    assert stored.attrs["loss"] == 1.5


def test_mapped_coefficients_are_those_that_are_read(
    tmp_path: Path, factorization: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(component_store, "BLOCK_BYTES", 2**17)
    path = tmp_path / "factorization.zarr"
    write_factorization(path, *factorization, {}, evidence_NK=2 * factorization[1])
    stored = open_factorization(path)
    coefficients_NK, evidence_NK = stored.map_coefficients(), stored.map_evidence()
    np.testing.assert_array_equal(coefficients_NK, factorization[1])
    np.testing.assert_array_equal(evidence_NK, 2 * factorization[1])
    assert coefficients_NK[:, 3].flags.c_contiguous
    next(file for file in (path / "coefficients").rglob("*") if file.is_file() and file.name != "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"coefficients of .* are corrupt"):
        stored.map_coefficients()


def test_writing_again_replaces_the_whole(tmp_path: Path, factorization: tuple[np.ndarray, np.ndarray]) -> None:
    path = tmp_path / "factorization.zarr"
    components_KD, coefficients_NK = factorization
    write_factorization(path, components_KD, coefficients_NK, {})
    write_factorization(path, components_KD[:5], coefficients_NK[:9, :5], {})
    assert open_factorization(path).read_coefficients().shape == (9, 5)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_numbers_that_are_not_right_are_refused_and_the_former_kept(
    tmp_path: Path, factorization: tuple[np.ndarray, np.ndarray]
) -> None:
    path = tmp_path / "factorization.zarr"
    components_KD, coefficients_NK = factorization
    write_factorization(path, components_KD, coefficients_NK, {})
    holes = coefficients_NK.copy()
    holes[5, 1] = np.nan
    for wrong in (
        (components_KD[1:], coefficients_NK),
        (components_KD * np.inf, coefficients_NK),
        (components_KD, holes),
        (components_KD[:0], coefficients_NK[:, :0]),
        (components_KD, coefficients_NK[:0]),
    ):
        with pytest.raises(ValueError, match=r"components|coefficients"):
            write_factorization(path, wrong[0], wrong[1], {})
    with pytest.raises(ValueError, match="JSON"):
        write_factorization(path, components_KD, coefficients_NK, {"loss": np.nan})
    np.testing.assert_array_equal(open_factorization(path).read_coefficients(), coefficients_NK)


def test_a_missing_factorization_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"factorization\.zarr does not exist: run `npeff factorize .*` first"):
        open_factorization(tmp_path / "factorization.zarr")


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
@pytest.mark.parametrize("chunk", ["components/c/0/0", "coefficients/c/0/0"])
def test_a_damaged_chunk_is_found(
    tmp_path: Path, factorization: tuple[np.ndarray, np.ndarray], chunk: str, damage: str
) -> None:
    path = tmp_path / "factorization.zarr"
    write_factorization(path, *factorization, {})
    content = (path / chunk).read_bytes()
    if damage == "delete":
        (path / chunk).unlink()
    else:
        flipped = content[:9] + bytes([content[9] ^ 4]) + content[10:]
        (path / chunk).write_bytes({"flip": flipped, "truncate": content[:-8], "empty": b""}[damage])
    stored = open_factorization(path)
    read, other = stored.read_components, stored.read_coefficients
    if chunk.startswith("coefficients"):
        read, other = other, read
    other()
    with pytest.raises(StoreError, match=r"of .*factorization\.zarr are corrupt: delete this store and run"):
        read()


def test_rows_in_parts_are_stored_as_the_whole_in_shards_and_with_their_lengths(
    tmp_path: Path, factorization: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    components_KD, coefficients_NK = factorization
    monkeypatch.setattr(component_store, "MIN_CHUNK_BYTES", 40_000)
    monkeypatch.setattr(component_store, "BLOCK_BYTES", 130_000)
    parts = StackedRows(np.split(coefficients_NK, [1, 700, 700, 2999]))
    write_factorization(tmp_path / "factorization.zarr", components_KD, parts, {})
    stored = open_factorization(tmp_path / "factorization.zarr")
    assert (stored.coefficients.chunks, stored.coefficients.shards) == ((200, K), (600, K))
    np.testing.assert_array_equal(stored.read_coefficients(), coefficients_NK)
    assert stored.attrs["checksums"]["coefficients"] == checksum({"coefficients": coefficients_NK})
    assert stored.coefficient_norms is not None
    norms_N = np.linalg.norm(coefficients_NK.astype(np.float64), axis=1)
    np.testing.assert_allclose(stored.coefficient_norms[...], norms_N, rtol=1e-12)


def test_stacked_rows_are_cut_like_the_whole_and_walked_over_by_column(
    factorization: tuple[np.ndarray, np.ndarray],
) -> None:
    coefficients_NK = factorization[1]
    parts = StackedRows(np.split(coefficients_NK, [1, 700, 2999]))
    assert parts.shape == (N, K)
    for rows in (slice(None), slice(0, 1), slice(699, 701), slice(5, 3000), slice(3000, None), slice(9, 9)):
        np.testing.assert_array_equal(parts[rows, slice(3, 17)], coefficients_NK[rows, 3:17])
    for w_N, expected_N in zip(columns_of(parts), coefficients_NK.T, strict=True):
        np.testing.assert_array_equal(w_N, np.nan_to_num(expected_N))
