"""Files written here by plain h5py, as the reference lays them out: what is read from them, and what is refused."""

from __future__ import annotations

import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from npeff.interchange.reference_files import (
    Decomposition,
    DiagonalPefHeader,
    PefHeader,
    file_format,
    open_decomposition,
    open_diagonal_pef,
    open_pef,
)
from npeff.interchange.reference_writing import write_decomposition, write_diagonal_pef, write_pef
from npeff.storage.errors import StoreError

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'npeff-pipeline[hdf5]'")

N, C, V, P, K = 7, 3, 6, 50, 2
OFFSETS = np.array([[0, 2, 5, 6], [0, 0, 6, 6], [0, 1, 2, 6], [0, 6, 6, 6], [0, 3, 3, 6], [0, 2, 4, 6], [0, 0, 0, 0]])
RANKS = np.array([1, 3, 2, 0, 2, 3, 1])
COLUMN_SIZES = np.array([6, 1, 2, 3, 4, 2, 3, 3, 2, 2, 2, 5])
"""Of an LVRM-PEF: of example 0: 6; 1: 1, 2, 3; 2: 4, 2; 3: none; 4: 3, 3; 5: 2, 2, 2; 6: 5, and one of padding."""


def write_lrm_pef(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "labels": np.array([0, 1, 2, 0, -1, 2, 1], np.int32),
        "logits": rng.normal(size=(N, C)).astype(np.float32),
        "values": rng.normal(size=(N, V)).astype(np.float32),
        "col_offsets": OFFSETS.astype(np.int32),
        "row_indices": np.stack([rng.permutation(P)[:V] for _ in range(N)]).astype(np.int32),
        "pef_frobenius_norms": rng.uniform(10, 20, size=N).astype(np.float32),
    }
    write_h5(path, {f"data/{name}": array for name, array in arrays.items()} | changes, {"data@n_classes": C})
    return arrays


def write_lvrm_pef(path: Path, **changes: Any) -> dict[str, np.ndarray]:
    arrays = write_lrm_pef(path)
    del arrays["col_offsets"]
    arrays |= {"ranks": RANKS.astype(np.int32), "col_sizes": COLUMN_SIZES.astype(np.int32)}
    write_h5(path, {f"data/{name}": array for name, array in arrays.items()} | changes, {"data@min_prob_class": 0.01})
    return arrays


def write_h5(path: Path, contents: dict[str, Any], attributes: dict[str, Any]) -> None:
    """`contents` also has attributes, as group@name; None leaves out."""
    with h5py.File(path, "w") as file:
        data = {"data@n_parameters": P} | attributes | contents
        for name, value in data.items():
            holder, _, attribute = name.partition("@")
            if value is not None and not attribute:
                file.create_dataset(name, data=value)
        for name, value in data.items():
            holder, _, attribute = name.partition("@")
            if value is not None and attribute:
                file.require_group(holder).attrs[attribute] = value


def content(path: Path) -> dict[str, tuple[str, Any]]:
    """Every dataset and attribute of a file, with its type."""
    found: dict[str, tuple[str, Any]] = {}

    def visit(name: str, thing: Any) -> None:
        if isinstance(thing, h5py.Dataset):
            assert thing.chunks is None, f"{name} is not contiguous"
            found[name] = (thing.dtype.str, thing[...].tolist())
        found.update({f"{name}@{key}": ("", np.asarray(value).tolist()) for key, value in thing.attrs.items()})

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return found


def assert_one_line(error: StoreError, path: Path) -> None:
    assert str(path) in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 500


def test_rows_of_an_lrm_pef_are_those_of_its_classes(tmp_path: Path) -> None:
    arrays = write_lrm_pef(path := tmp_path / "a.h5")
    assert file_format(path) == "LRM-PEF"
    with open_pef(path) as file:
        assert file.header == PefHeader("LRM-PEF", N, C, P, V, C, None)
        blocks = list(file.blocks(block_values=2 * V + 1))
    assert [(block.start, len(block.labels_N)) for block in blocks] == [(0, 2), (2, 2), (4, 2), (6, 1)]
    for block in blocks:
        dense = np.zeros((len(block.labels_N), C, P), np.float32)
        examples, rows, indices, values = block.entries()
        dense[examples, rows, indices] = values
        for i, example in enumerate(range(block.start, block.start + len(block.labels_N))):
            for y in range(C):
                row = np.zeros(P, np.float32)
                used = slice(OFFSETS[example, y], OFFSETS[example, y + 1])
                row[arrays["row_indices"][example, used]] = arrays["values"][example, used]
                np.testing.assert_array_equal(dense[i, y], row)
            assert block.labels_N[i] == arrays["labels"][example]
            np.testing.assert_array_equal(block.logits_NC[i], arrays["logits"][example])
            assert block.frobenius_norms_N[i] == arrays["pef_frobenius_norms"][example]


def test_rows_of_an_lvrm_pef_vary_in_number(tmp_path: Path) -> None:
    arrays = write_lvrm_pef(path := tmp_path / "a.h5")
    with open_pef(path) as file:
        assert file.header == PefHeader("LVRM-PEF", N, C, P, V, 3, 0.01)
        blocks = list(file.blocks(start=1, stop=6, block_values=3 * V))
    assert [block.start for block in blocks] == [1, 4]
    sizes = {1: [1, 2, 3], 2: [4, 2], 3: [], 4: [3, 3], 5: [2, 2, 2]}
    for block in blocks:
        examples, rows, indices, values = block.entries()
        for i, example in enumerate(range(block.start, block.start + len(block.labels_N))):
            assert block.ranks_N[i] == len(sizes[example])
            np.testing.assert_array_equal(
                rows[examples == i], np.repeat(np.arange(len(sizes[example])), sizes[example])
            )
            count = sum(sizes[example])
            np.testing.assert_array_equal(indices[examples == i], arrays["row_indices"][example, :count])
            np.testing.assert_array_equal(values[examples == i], arrays["values"][example, :count])


@pytest.mark.parametrize("write", [write_lrm_pef, write_lvrm_pef])
def test_a_pef_file_is_written_as_it_was_read(tmp_path: Path, write: Callable[..., Any]) -> None:
    write(tmp_path / "a.h5")
    with open_pef(tmp_path / "a.h5") as file:
        write_pef(tmp_path / "b.h5", file.header, file.blocks(block_values=2 * V))
    assert content(tmp_path / "b.h5") == content(tmp_path / "a.h5")
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["a.h5", "b.h5"]


def d_pef(path: Path, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    contents = {
        "data/labels": np.arange(N, dtype=np.int32),
        "data/predicted_logits": rng.normal(size=(N, C)).astype(np.float32),
        "data/dense_fisher_norms": rng.uniform(1, 2, size=N).astype(np.float32),
        "data/fisher/values": -np.sort(-rng.uniform(size=(N, V)).astype(np.float32), axis=1),
        "data/fisher/indices": rng.integers(P, size=(N, V)).astype(np.int32),
    }
    attributes = {"data@n_parameters": None, "data/fisher@dense_fisher_size": P}
    write_h5(path, contents | changes, attributes)
    return contents


def test_a_d_pef_is_read_by_blocks_and_written_as_it_was_read(tmp_path: Path) -> None:
    contents = d_pef(path := tmp_path / "a.h5")
    assert file_format(path) == "D-PEF"
    with open_diagonal_pef(path) as file:
        assert file.header == DiagonalPefHeader(N, C, P, V)
        blocks = list(file.blocks(block_values=3 * V))
        write_diagonal_pef(tmp_path / "b.h5", file.header, file.blocks(block_values=3 * V))
    assert [block.start for block in blocks] == [0, 3, 6]
    np.testing.assert_array_equal(blocks[1].values_NV, contents["data/fisher/values"][3:6])
    np.testing.assert_array_equal(blocks[1].norms_N, contents["data/dense_fisher_norms"][3:6])
    assert content(tmp_path / "b.h5") == content(path)


def lrm_decomposition(path: Path, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    contents = {
        "data/W": rng.uniform(size=(N, K)).astype(np.float32),
        "data/G": rng.normal(size=(K, 5)).astype(np.float32),
        "data/new_to_old_col_indices": np.array([3, 7, 8, 20, 49], np.int32),
        "losses/G_only": np.array([3, 2], np.float32),
        "losses/joint": np.array([1, 0.5, 0.25], np.float32),
    }
    write_h5(path, contents | changes, {"data@n_classes": C, "losses@log_loss_frequency": 10})
    return contents


def d_decomposition(path: Path, place: str = "data", **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    contents = {
        "data/W": rng.uniform(size=(N, K)).astype(np.float32),
        "data/H": rng.uniform(size=(K, 4)).astype(np.float32),
        "data/reduce_kept_indices": np.array([0, 9, 10, 48]),
    }
    write_h5(path, contents | changes, {"data@n_parameters": None})
    with h5py.File(path, "r+") as file:
        file[place].attrs["full_dense_size"] = np.array([P])
    return contents


def test_an_lrm_decomposition_is_written_as_it_was_read(tmp_path: Path) -> None:
    contents = lrm_decomposition(path := tmp_path / "a.h5")
    with open_decomposition(path) as file:
        found, components = file.decomposition, file.components(0, K)
        np.testing.assert_array_equal(file.components(1, 2), contents["data/G"][1:])
    np.testing.assert_array_equal(found.coefficients_NK, contents["data/W"])
    np.testing.assert_array_equal(components, contents["data/G"])
    np.testing.assert_array_equal(found.column_indices_M, [3, 7, 8, 20, 49])
    np.testing.assert_array_equal(found.losses_joint, np.array([1, 0.5, 0.25], np.float32))
    assert (found.n_parameters, found.n_classes, found.log_loss_frequency) == (P, C, 10)
    write_decomposition(tmp_path / "b.h5", found, components)
    assert content(tmp_path / "b.h5") == content(path)


def test_a_decomposition_without_losses_is_read(tmp_path: Path) -> None:
    nothing = {"losses/G_only": None, "losses/joint": None, "losses@log_loss_frequency": None}
    lrm_decomposition(path := tmp_path / "a.h5", **nothing)
    with open_decomposition(path) as file:
        found = file.decomposition
    assert (found.losses_g_only, found.losses_joint, found.log_loss_frequency) == (None, None, None)


@pytest.mark.parametrize("place", ["data", "data/reduce_kept_indices"])
def test_a_d_decomposition_is_read_wherever_its_size_is_kept(tmp_path: Path, place: str) -> None:
    contents = d_decomposition(path := tmp_path / "a.h5", place)
    with open_decomposition(path) as file:
        found, components = file.decomposition, file.components(0, K)
    assert isinstance(found, Decomposition)
    assert (found.format, found.n_parameters, found.n_classes) == ("D decomposition", P, None)
    write_decomposition(tmp_path / "b.h5", found, components)
    with open_decomposition(tmp_path / "b.h5") as file:
        again = file.decomposition
        np.testing.assert_array_equal(file.components(0, K), contents["data/H"])
    for field in fields(Decomposition):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(found, field.name))
    assert content(path).items() <= content(tmp_path / "b.h5").items()


MANY = 10**9
ASCENDING = OFFSETS.astype(np.int32)
DEFECTS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (write_lrm_pef, {"data@n_classes": 4}, "data@n_classes"),
    (write_lrm_pef, {"data@n_classes": None}, "no number data@n_classes"),
    (write_lrm_pef, {"data@n_parameters": None}, "no number data@n_parameters"),
    (write_lrm_pef, {"data@n_parameters": 0}, "n_parameters = 0"),
    (write_lrm_pef, {"data@n_parameters": 2.0**40}, "int32"),
    (write_lrm_pef, {"data@n_parameters": 4}, r"not all in 0..3"),
    (write_lrm_pef, {"data@n_parameters": "many"}, "no number data@n_parameters"),
    (write_lrm_pef, {"data/labels": None}, "has no data/labels"),
    (write_lrm_pef, {"data/labels": np.zeros(N - 1, np.int32)}, "data/labels of shape"),
    (write_lrm_pef, {"data/labels": np.zeros(N, np.float32)}, "data/labels of type float32"),
    (write_lrm_pef, {"data/values": np.zeros((N, V + 1), np.float32)}, "data/row_indices of shape"),
    (write_lrm_pef, {"data/values": np.zeros((N, V, 1), np.float32)}, "data/values of shape"),
    (write_lrm_pef, {"data/row_indices": np.full((N, V), -1, np.int32)}, "not all in 0..49"),
    (write_lrm_pef, {"data/row_indices": np.full((N, V), 2**32, np.int64)}, "not all in 0..49"),
    (write_lrm_pef, {"data/col_offsets": ASCENDING + (np.arange(N) == 2)[:, None]}, "example 2"),
    (write_lrm_pef, {"data/col_offsets": ASCENDING[:, ::-1]}, "example 0"),
    (write_lrm_pef, {"data/col_offsets": ASCENDING * 2}, "example 0"),
    (write_lrm_pef, {"data/pef_frobenius_norms": None}, "has no data/pef_frobenius_norms"),
    (write_lrm_pef, {"data/col_offsets": None}, "is not a file of the reference implementation"),
    (write_lvrm_pef, {"data/ranks": RANKS + 1}, "data/col_sizes of shape"),
    (write_lvrm_pef, {"data/ranks": -RANKS}, "negative data/ranks"),
    (write_lvrm_pef, {"data/ranks": np.array([12, 0, 0, 0, 0, 0, 0])}, "data/ranks above the 3 classes"),
    (write_lvrm_pef, {"data/col_sizes": -COLUMN_SIZES}, "example 0"),
    (write_lvrm_pef, {"data/col_sizes": COLUMN_SIZES + 1}, "example 0"),
    (write_lvrm_pef, {"data@min_prob_class": None}, "no number data@min_prob_class"),
    (d_pef, {"data/fisher/values": np.full((N, V), -1, np.float32)}, "negative data/fisher/values"),
    (d_pef, {"data/fisher@dense_fisher_size": 1}, "data/fisher/indices that are not all in 0..0"),
    (lrm_decomposition, {"data@n_classes": MANY}, "data@n_classes = 1e"),
    (lrm_decomposition, {"data@n_classes": 2.5}, "data@n_classes = 2.5, which is not a number of classes"),
    (lrm_decomposition, {"data/W": np.full((N, K), -1, np.float32)}, "non-negative"),
    (lrm_decomposition, {"data/W": np.full((N, K), np.nan, np.float32)}, "not finite"),
    (lrm_decomposition, {"data/W": np.zeros((N, K + 1), np.float32)}, "data/G of shape"),
    (lrm_decomposition, {"data/G": np.full((K, 5), np.nan, np.float32)}, "data/G that is not finite"),
    (lrm_decomposition, {"data/new_to_old_col_indices": np.zeros(5, np.int32)}, "occur twice"),
    (lrm_decomposition, {"data/new_to_old_col_indices": np.full(5, P, np.int32)}, "not all in 0..49"),
    (lrm_decomposition, {"losses/joint": np.zeros((2, 2), np.float32)}, "losses/joint of shape"),
    (d_decomposition, {"data/reduce_kept_indices": np.arange(3)}, "data/reduce_kept_indices of shape"),
]


def read_all(path: Path) -> None:
    form = file_format(path)
    if form.endswith("decomposition"):
        with open_decomposition(path) as file:
            file.components(0, K)
    elif form == "D-PEF":
        with open_diagonal_pef(path) as diagonal:
            list(diagonal.blocks())
    else:
        with open_pef(path) as pef:
            list(pef.blocks(block_values=2 * V))


@pytest.mark.parametrize(("write", "changes", "message"), DEFECTS)
def test_a_defect_is_named_in_one_line(
    tmp_path: Path, write: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    write(path := tmp_path / "intact.h5")
    read_all(path)
    write(path := tmp_path / "a.h5", **changes)
    with pytest.raises(StoreError, match=message) as caught:
        read_all(path)
    assert_one_line(caught.value, path)


CHUNKS: dict[str, Any] = {"chunks": True}
DEFLATE: dict[str, Any] = {"chunks": True, "compression": "gzip", "shuffle": True}
CLAIMS: list[tuple[Callable[..., Any], str, tuple[int, ...], dict[str, Any]]] = [
    (write_lrm_pef, "data/logits", (MANY, C), {}),
    (write_lrm_pef, "data/logits", (MANY, C), CHUNKS),
    (write_lrm_pef, "data/logits", (MANY, C), DEFLATE),
    (write_lrm_pef, "data/logits", (N, MANY), {}),
    (write_lrm_pef, "data/values", (N, MANY), {}),
    (write_lrm_pef, "data/values", (N, V), {}),
    (write_lrm_pef, "data/row_indices", (N, V), {}),
    (write_lrm_pef, "data/labels", (N,), DEFLATE),
    (write_lrm_pef, "data/col_offsets", (N, C + 1), CHUNKS),
    (write_lvrm_pef, "data/ranks", (N,), {}),
    (write_lvrm_pef, "data/logits", (MANY, C), {}),
    (d_pef, "data/predicted_logits", (MANY, C), {}),
    (d_pef, "data/fisher/values", (N, MANY), {}),
    (d_pef, "data/fisher/indices", (N, V), {}),
    (lrm_decomposition, "data/W", (MANY, K), {}),
    (lrm_decomposition, "data/G", (K, MANY), DEFLATE),
    (lrm_decomposition, "losses/joint", (MANY,), {}),
    (d_decomposition, "data/W", (MANY, K), {}),
    (d_decomposition, "data/H", (K, MANY), {}),
]


@pytest.mark.parametrize(("write", "name", "shape", "storage"), CLAIMS)
def test_an_array_that_the_file_does_not_contain_is_refused_before_memory_is_allocated(
    write: Callable[..., Any], name: str, shape: tuple[int, ...], storage: dict[str, Any], tmp_path: Path
) -> None:
    write(path := tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        kind = file[name].dtype
        del file[name]
        file.create_dataset(name, shape, kind, **storage)
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(StoreError, match=rf"a {name} of shape \(.*, of which it contains only 0 bytes") as caught:
        read_all(path)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert_one_line(caught.value, path)


@pytest.mark.parametrize("storage", [CHUNKS, DEFLATE, {"chunks": True, "compression": "lzf"}])
def test_arrays_in_compressed_chunks_are_read(storage: dict[str, Any], tmp_path: Path) -> None:
    arrays = write_lrm_pef(path := tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        for name, array in arrays.items():
            del file[f"data/{name}"]
            file.create_dataset(f"data/{name}", data=array, **storage)
    with open_pef(path) as pef:
        (block,) = pef.blocks()
    np.testing.assert_array_equal(block.values_NV, arrays["values"])


def linked(file: Any, folder: Path) -> None:
    file["data/labels"] = h5py.ExternalLink(str(folder / "other.h5"), "data/labels")


def stored_outside(file: Any, folder: Path) -> None:
    (folder / "labels.raw").write_bytes(bytes(4 * N))
    file.create_dataset("data/labels", (N,), np.int32, external=[(str(folder / "labels.raw"), 0, 4 * N)])


def virtual(file: Any, folder: Path) -> None:
    layout = h5py.VirtualLayout((N,), np.int32)
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "data/labels", (N,))
    file.create_virtual_dataset("data/labels", layout)


def dangling(file: Any, folder: Path) -> None:
    file["data/labels"] = h5py.SoftLink("/data/nothing")


def group(file: Any, folder: Path) -> None:
    file.create_group("data/labels")


def without_shape(file: Any, folder: Path) -> None:
    file.create_dataset("data/labels", data=h5py.Empty("i4"))


@pytest.mark.parametrize(
    ("replace_labels", "message"),
    [
        (linked, "has a data/labels in another file"),
        (stored_outside, "has a data/labels in another file"),
        (virtual, "has a data/labels in another file"),
        (dangling, "has no data/labels"),
        (group, "has no data/labels"),
        (without_shape, "is damaged"),
    ],
)
def test_arrays_that_are_not_in_the_file_are_refused(
    replace_labels: Callable[[Any, Path], None], message: str, tmp_path: Path
) -> None:
    write_lrm_pef(tmp_path / "other.h5")
    write_lrm_pef(path := tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        del file["data/labels"]
        replace_labels(file, tmp_path)
    with pytest.raises(StoreError, match=message) as caught:
        read_all(path)
    assert_one_line(caught.value, path)


@pytest.mark.parametrize("write", [write_lrm_pef, write_lvrm_pef, d_pef, lrm_decomposition, d_decomposition])
def test_a_truncated_or_scrambled_file_is_a_store_error_or_reads(tmp_path: Path, write: Callable[..., Any]) -> None:
    write(path := tmp_path / "a.h5")
    intact = path.read_bytes()
    for kept in range(0, len(intact), 97):
        path.write_bytes(intact[:kept])
        with pytest.raises(StoreError) as caught:
            read_all(path)
        assert_one_line(caught.value, path)
    refused = 0
    for position in range(0, len(intact), 61):
        path.write_bytes(
            intact[:position] + bytes(255 - byte for byte in intact[position : position + 4]) + intact[position + 4 :]
        )
        try:
            read_all(path)
        except StoreError as error:
            assert_one_line(error, path)
            refused += 1
    assert refused > 5


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(StoreError, match="No such file"):
        file_format(path)
    path.write_text("no HDF5")
    with pytest.raises(StoreError, match="is not an HDF5 file"):
        file_format(path)
    with pytest.raises(StoreError, match="directory"):
        file_format(tmp_path)
    write_lrm_pef(path)
    with pytest.raises(StoreError, match="the format LRM-PEF: give a D-PEF"), open_diagonal_pef(path):
        pass
    with (
        pytest.raises(StoreError, match="the format LRM-PEF: give an LRM or D decomposition"),
        open_decomposition(path),
    ):
        pass
    lrm_decomposition(path)
    with pytest.raises(StoreError, match="the format LRM decomposition: give an LRM-PEF"), open_pef(path):
        pass


def test_without_h5py_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lrm_pef(path := tmp_path / "a.h5")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(StoreError, match=r"pip install 'npeff-pipeline\[hdf5\]'"):
        file_format(path)


def test_what_cannot_be_written_leaves_the_former_file(tmp_path: Path) -> None:
    write_lrm_pef(path := tmp_path / "a.h5")
    before = path.read_bytes()
    write_lvrm_pef(other := tmp_path / "b.h5")
    with open_pef(other) as file:
        with pytest.raises(ValueError, match="3 examples were given"):
            write_pef(path, file.header, file.blocks(stop=3))
        with pytest.raises(ValueError, match="begins at example 3"):
            write_pef(path, file.header, file.blocks(start=3))
        with pytest.raises(StoreError, match="cannot write"):
            write_pef(path / "c.h5", file.header, file.blocks())
        with pytest.raises(StoreError, match="cannot write"):
            write_pef(tmp_path, file.header, file.blocks())
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.h5", "b.h5"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    write_lrm_pef(path := tmp_path / "a.h5")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_pef(path) as file:
        header = replace(file.header, n_values=1 << 16)
        block = next(file.blocks())
        wide = replace(block, values_NV=np.ones((N, 1 << 16), np.float32), indices_NV=np.zeros((N, 1 << 16), np.int32))
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, hard))
        try:
            with pytest.raises(StoreError, match="cannot write") as caught:
                write_pef(tmp_path / "b.h5", header, [wide])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(caught.value, tmp_path / "b.h5")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.h5"]


def test_memory_is_bounded_by_blocks(tmp_path: Path) -> None:
    n, v = 400, 5000
    rng = np.random.default_rng(0)
    write_lrm_pef(
        path := tmp_path / "a.h5",
        **{
            "data@n_parameters": 10**6,
            "data/labels": np.zeros(n, np.int32),
            "data/logits": np.zeros((n, C), np.float32),
            "data/values": rng.normal(size=(n, v)).astype(np.float32),
            "data/col_offsets": np.tile(np.array([0, 10, 20, v], np.int32), (n, 1)),
            "data/row_indices": rng.integers(10**6, size=(n, v)).astype(np.int32),
            "data/pef_frobenius_norms": np.ones(n, np.float32),
        },
    )

    def peak_bytes(block_values: int) -> int:
        tracemalloc.start()
        with open_pef(path) as file:
            write_pef(tmp_path / "b.h5", file.header, file.blocks(block_values=block_values))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert peak_bytes(10 * v) < n * v * 8 / 8 < n * v * 8 < peak_bytes(n * v)
