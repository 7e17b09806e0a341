"""Runs from files that are written here as the reference lays them out, and such files from runs.

Shapes: N examples, C classes, R rows, V values, P parameters, D coordinates, K components.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
from npeff.errors import NpeffError
from npeff.interchange import import_run as interchange
from npeff.interchange.coordinates import Columns, CountSketch
from npeff.interchange.export_run import export_factorization, export_fishers, export_run
from npeff.interchange.import_run import import_factorization, import_fishers, import_run
from npeff.interchange.options import ImportOptions
from npeff.query.components import ComponentStore
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.stage import recorded
from npeff.stages.factorize import FACTORIZE
from npeff.stages.fishers import FISHERS
from npeff.stages.status import status
from npeff.storage.errors import StoreError
from npeff.store.component_store import open_factorization
from npeff.store.fisher_store import FisherStore
from npeff.store.shard_records import CompletionRecord, ShardRecords
from npeff.store.tables import read_table
from planted import planted_fishers

h5py = pytest.importorskip("h5py", reason="h5py is not installed: pip install 'npeff-pipeline[hdf5]'")

N, C, V, P, K = 60, 3, 30, 400, 4


@dataclass(frozen=True)
class Pefs:
    """Sparse rows of examples that a few components explain, in full coordinates, and what a file says of them."""

    rows: list[np.ndarray]
    """Of each example (its rank, P) float32, no more than V of them other than 0."""
    norms_N: np.ndarray
    labels_N: np.ndarray
    logits_NC: np.ndarray

    @property
    def normalised(self) -> list[np.ndarray]:
        return [rows / np.sqrt(norm) for rows, norm in zip(self.rows, self.norms_N, strict=True)]


def make_pefs(ranks: Iterable[int], seed: int = 0) -> Pefs:
    """Rows live on 100 of the P parameters; one in ten parameters has few values in the whole file."""
    rng = np.random.default_rng(seed)
    where = np.sort(rng.permutation(P)[:100])
    planted = planted_fishers(n_examples=N, rank=C, dim=100, n_components=K, noise=0.1, seed=seed)
    rows, norms = [], []
    for factor, rank in zip(planted.factors_NRD, ranks, strict=True):
        dense = np.zeros((rank, P))
        dense[:, where] = factor[:rank] * rng.uniform(1, 3)
        norms.append(np.linalg.norm(dense @ dense.T))
        sparse = np.zeros_like(dense)
        largest = np.argsort(-np.abs(dense), axis=None)[:V]
        sparse.flat[largest] = dense.flat[largest]
        rows.append(sparse.astype(np.float32))
    logits = rng.normal(size=(N, C)).astype(np.float32)
    return Pefs(rows, np.array(norms, np.float32), rng.integers(-1, C, N).astype(np.int32), logits)


def write_pefs(path: Path, pefs: Pefs, low_rank: bool = True, **changes: np.ndarray) -> Path:
    values, indices = np.zeros((N, V), np.float32), np.zeros((N, V), np.int32)
    sizes: list[list[int]] = []
    for i, rows in enumerate(pefs.rows):
        at, columns = np.nonzero(rows)
        values[i, : len(at)], indices[i, : len(at)] = rows[at, columns], columns
        sizes.append(np.bincount(at, minlength=len(rows)).tolist())
    data: dict[str, np.ndarray] = {
        "labels": pefs.labels_N,
        "logits": pefs.logits_NC,
        "values": values,
        "row_indices": indices,
        "pef_frobenius_norms": pefs.norms_N,
    }
    with h5py.File(path, "w") as file:
        if low_rank:
            data["col_offsets"] = np.array([[0, *np.cumsum(some)] for some in sizes], np.int32)
            file.require_group("data").attrs["n_classes"] = C
        else:
            data["ranks"] = np.array([len(some) for some in sizes], np.int32)
            data["col_sizes"] = np.array([size for some in sizes for size in some], np.int32)
            file.require_group("data").attrs["min_prob_class"] = 0.02
        file["data"].attrs["n_parameters"] = P
        for name, array in (data | changes).items():
            file["data"].create_dataset(name, data=array)
    return path


def write_decomposition(path: Path, w_NK: np.ndarray, g_KM: np.ndarray, columns_M: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        file["data/W"], file["data/G"] = w_NK.astype(np.float32), g_KM.astype(np.float32)
        file["data/new_to_old_col_indices"] = columns_M.astype(np.int32)
        file["data"].attrs.update({"n_parameters": P, "n_classes": C})
        file["losses/G_only"], file["losses/joint"] = np.zeros(0, np.float32), np.array([9.0, 8.0], np.float32)
        file["losses"].attrs["log_loss_frequency"] = 100
    return path


@pytest.fixture(scope="module")
def pefs() -> Pefs:
    return make_pefs([C] * N)


@pytest.fixture(scope="module")
def variable() -> Pefs:
    return make_pefs(np.random.default_rng(1).integers(1, C + 1, N))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, pefs: Pefs) -> Path:
    return write_pefs(tmp_path_factory.mktemp("lrm") / "pefs.h5", pefs)


@pytest.fixture(scope="module")
def variable_file(tmp_path_factory: pytest.TempPathFactory, variable: Pefs) -> Path:
    return write_pefs(tmp_path_factory.mktemp("lvrm") / "pefs.h5", variable, low_rank=False)


def serial(run: RunDirectory) -> RunDirectory:
    return RunDirectory(run.path, run.config.with_executor(kind="serial"))


def stored(run: RunDirectory) -> dict[str, np.ndarray]:
    return FisherStore.open(run.fishers).read_rows(np.arange(N))


def sketch_matrix(dim: int, seed: int) -> np.ndarray:
    """The count sketch as a matrix (P, D)."""
    places_P, signs_P = CountSketch(dim, seed, P).place(np.arange(P))
    q_PD = np.zeros((P, dim))
    q_PD[np.arange(P), places_P] = signs_P
    return q_PD


def products(factors: Iterable[np.ndarray]) -> np.ndarray:
    """⟨F_i, F_j⟩ of all pairs."""
    factors = list(factors)
    return np.array([[np.square(a.astype(float) @ b.T).sum() for b in factors] for a in factors])


def assert_one_line(error: Exception) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 600


def test_inner_products_of_imported_factors_are_those_of_the_sparse_rows(
    tmp_path: Path, file: Path, pefs: Pefs
) -> None:
    run = import_fishers(file, tmp_path / "run")
    arrays = stored(run)
    np.testing.assert_allclose(products(arrays["factors"]), products(pefs.normalised), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(arrays["grams"], [rows @ rows.T for rows in pefs.rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(arrays["frobenius_norms"], pefs.norms_N)
    np.testing.assert_array_equal(arrays["labels"], pefs.labels_N)
    np.testing.assert_array_equal(arrays["logits"], pefs.logits_NC)
    np.testing.assert_array_equal(arrays["ranks"], C)
    assert arrays["valid"].all()
    # and each coordinate is the parameter that the store says it is
    sketch = FisherStore.open(run.fishers).attrs["sketch"]
    assert sketch["kind"] == "columns"
    assert sketch["indices"] == np.flatnonzero(np.abs(np.concatenate(pefs.rows)).any(axis=0)).tolist()
    np.testing.assert_allclose(
        arrays["factors"], np.stack(pefs.normalised)[:, :, sketch["indices"]], rtol=1e-6, atol=1e-9
    )


def test_ranks_may_vary(tmp_path: Path, variable_file: Path, variable: Pefs) -> None:
    arrays = stored(import_fishers(variable_file, tmp_path / "run"))
    np.testing.assert_array_equal(arrays["ranks"], [len(rows) for rows in variable.rows])
    np.testing.assert_allclose(products(arrays["factors"]), products(variable.normalised), rtol=1e-5, atol=1e-9)
    p_NC = np.exp(variable.logits_NC) / np.exp(variable.logits_NC).sum(axis=1, keepdims=True)
    for p_C, rows, kept in zip(p_NC, variable.rows, arrays["kept_trace"], strict=True):
        likeliest = np.argsort(-p_C)[: len(rows)]
        parts = [p_C[y] * np.square(np.eye(C)[y] - p_C).sum() for y in likeliest]
        assert kept == pytest.approx(sum(parts) / np.trace(np.diag(p_C) - np.outer(p_C, p_C)), rel=1e-5)


def test_losses_are_those_of_the_labels_where_they_are_known(tmp_path: Path, file: Path, pefs: Pefs) -> None:
    losses_N = stored(import_fishers(file, tmp_path / "run"))["losses"]
    p_NC = np.exp(pefs.logits_NC) / np.exp(pefs.logits_NC).sum(axis=1, keepdims=True)
    known = pefs.labels_N >= 0
    assert np.isnan(losses_N[~known]).all()
    np.testing.assert_allclose(losses_N[known], -np.log(p_NC[known, pefs.labels_N[known]]), rtol=1e-5)


def test_parameters_with_few_values_are_dropped(tmp_path: Path, file: Path, pefs: Pefs) -> None:
    counts_P = np.count_nonzero(np.concatenate(pefs.rows), axis=0)
    kept = counts_P >= 12
    assert 0 < kept.sum() < (counts_P > 0).sum()
    expected = [rows * kept for rows in pefs.normalised]
    factors = stored(import_fishers(file, tmp_path / "columns", options=ImportOptions(min_nonzero=12)))["factors"]
    np.testing.assert_allclose(products(factors), products(expected), rtol=1e-5, atol=1e-9)
    options = ImportOptions(min_nonzero=12, max_dim=1, dim=64)
    factors = stored(import_fishers(file, tmp_path / "count", options=options))["factors"]
    np.testing.assert_allclose(factors, np.stack(expected) @ sketch_matrix(64, seed=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(StoreError, match="no parameter has 1000 values") as caught:
        import_fishers(file, tmp_path / "none", options=ImportOptions(min_nonzero=1000))
    assert_one_line(caught.value)


def test_many_parameters_are_hashed_whatever_the_order_of_the_file(tmp_path: Path, file: Path, pefs: Pefs) -> None:
    options = ImportOptions(max_dim=50, dim=64, seed=3)
    run = import_fishers(file, tmp_path / "run", options=options)
    factors = stored(run)["factors"]
    assert FisherStore.open(run.fishers).attrs["sketch"] == {"kind": "count", "dim": 64, "seed": 3, "n_parameters": P}
    np.testing.assert_allclose(factors, np.stack(pefs.normalised) @ sketch_matrix(64, seed=3), rtol=1e-5, atol=1e-6)
    backwards = Pefs(pefs.rows[::-1], pefs.norms_N[::-1], pefs.labels_N[::-1], pefs.logits_NC[::-1])
    again = import_fishers(write_pefs(tmp_path / "b.h5", backwards), tmp_path / "again", options=options)
    np.testing.assert_allclose(stored(again)["factors"][::-1], factors, atol=1e-7)


def test_a_count_sketch_keeps_inner_products_on_average() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, P))
    found = []
    for seed in range(300):
        places, signs = CountSketch(32, seed, P).place(np.arange(P))
        a, b = (np.bincount(places, weights=v * signs, minlength=32) for v in (x, y))
        found.append(a @ b)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - x @ y) < 4 * error
    assert np.std(found) < 2 * np.linalg.norm(x) * np.linalg.norm(y) / np.sqrt(32)
    places, signs = CountSketch(32, 0, 2**31).place(np.arange(2**31 - 64_000, 2**31))
    assert np.bincount(places, minlength=32).min() > 1700
    assert abs(int(signs.sum())) < 1200


def test_columns_drop_what_is_not_among_them() -> None:
    places, signs = Columns(np.array([2, 5, 9]), 10).place(np.array([0, 2, 3, 5, 9, 9]))
    np.testing.assert_array_equal(signs, [0, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(places[signs > 0], [0, 1, 2, 2])


def test_factorize_query_and_report_go_on_from_an_imported_file(tmp_path: Path, file: Path, pefs: Pefs) -> None:
    options = ImportOptions(n_components=K, class_names=("no", "maybe", "yes"), held_out_fraction=0.25)
    run = serial(import_run(file, tmp_path / "run", options=options))
    assert {row.stage: str(row.state) for row in status(run)}["fishers"] == "complete"
    assert recorded(run, FISHERS) is not None
    summary = npeff.factorize(run)
    assert npeff.check(run) == []
    record = run.shard_records / "00000.json"
    content = record.read_bytes()
    record.write_bytes(content[:-9])
    (left,) = npeff.check(run, recompute=True)
    assert (left.what, left.remedy) == ("shard 0", "import the file again, into a new run_dir")
    assert record.exists()
    record.write_bytes(content)
    run.table("coefficients").unlink()
    assert npeff.check(run, recompute=True) == []
    assert summary["explained"] > 0.3
    components = ComponentStore.open(run.path)
    top = components.top_examples(0, n=3)
    assert top.num_rows == 3
    example = top["example"].to_pylist()[0]
    assert components.example(str(example)).num_rows > 0
    label = int(pefs.labels_N[example])
    assert top["label_name"].to_pylist()[0] == (None if label < 0 else ("no", "maybe", "yes")[label])
    page = npeff.report(run).read_text(encoding="utf-8")
    assert "pefs.h5" in page
    for stage in (npeff.lift, npeff.verify):
        with pytest.raises(NpeffError) as caught:
            stage(run)
        assert_one_line(caught.value)
    with pytest.raises(NpeffError, match="imported") as caught:
        npeff.lift(run)
    assert_one_line(caught.value)


def test_an_interrupted_import_goes_on_and_another_file_is_refused(
    tmp_path: Path, pefs: Pefs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interchange, "_SHARD_NUMBERS", 10 * C * 100)
    path = write_pefs(tmp_path / "a.h5", pefs)
    run = import_fishers(path, tmp_path / "run")
    records = sorted(run.shard_records.glob("*.json"))
    assert len(records) > 3
    before = [record.read_text() for record in records]
    run.reopen("fishers")
    records[1].unlink()
    records[-1].unlink()
    import_fishers(path, tmp_path / "run")
    after = [record.read_text() for record in records]
    assert (after[0], after[2]) == (before[0], before[2])
    checksums = [[line for line in text.splitlines() if "checksum" in line] for text in (before[1], after[1])]
    assert checksums[0] == checksums[1]
    assert recorded(run, FISHERS) is not None
    write_pefs(path, make_pefs([C] * N, seed=5))
    with pytest.raises(RunDirectoryError, match=r"task\.options\.checksum") as caught:
        import_fishers(path, tmp_path / "run")
    assert_one_line(caught.value)


def test_what_is_not_finite_is_left_out(tmp_path: Path, pefs: Pefs) -> None:
    rows = [some.copy() for some in pefs.rows]
    rows[3][rows[3] != 0] = np.nan
    rows[4][np.nonzero(rows[4])[0][0], np.nonzero(rows[4])[1][0]] = np.inf
    norms, logits = pefs.norms_N.copy(), pefs.logits_NC.copy()
    norms[5], logits[6, 1] = np.inf, np.nan
    rows[7][:], norms[7] = 0, 0
    run = import_fishers(write_pefs(tmp_path / "a.h5", Pefs(rows, norms, pefs.labels_N, logits)), tmp_path / "run")
    arrays = stored(run)
    np.testing.assert_array_equal(np.flatnonzero(~arrays["valid"]), [3, 4, 5, 6])
    assert not arrays["factors"][3:8].any()
    assert run.record("fishers") is not None
    assert read_table(run.table("examples"), "examples")["prediction"].null_count == 4
    export_fishers(run.path, tmp_path / "b.h5")
    again = stored(import_fishers(tmp_path / "b.h5", tmp_path / "again"))
    np.testing.assert_allclose(products(again["factors"]), products(arrays["factors"]), rtol=1e-5, atol=1e-9)


def test_contradictions_are_named(tmp_path: Path, pefs: Pefs) -> None:
    labels, negative, zero = pefs.labels_N.copy(), pefs.norms_N.copy(), pefs.norms_N.copy()
    labels[8], negative[9], zero[10] = C, -1, 0
    for name, changes, message in (
        ("label", {"labels": labels}, "example 8 of .* has a label that is not one of its 3 classes"),
        ("negative", {"pef_frobenius_norms": negative}, "example 9 of .* has a negative Frobenius norm"),
        ("zero", {"pef_frobenius_norms": zero}, "example 10 of .* has Frobenius norm 0 and non-zero values"),
    ):
        path = write_pefs(tmp_path / f"{name}.h5", pefs, **changes)
        with pytest.raises(StoreError, match=message) as caught:
            import_fishers(path, tmp_path / name)
        assert_one_line(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim = 0"),
        ({"min_nonzero": 70_000}, "at most 65535"),
        ({"n_components": 0}, "n_components = 0"),
        ({"held_out_fraction": 1}, "held_out_fraction = 1 must"),
        ({"seed": -1}, "seed = -1"),
        ({"class_names": ("one",)}, "has 3 classes"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, file: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        import_fishers(file, tmp_path / "run", options=ImportOptions(**options))
    assert_one_line(caught.value)


def read_rows(path: Path) -> list[np.ndarray]:
    """The dense rows of each example of an LRM-PEF or LVRM-PEF file, by plain h5py."""
    rows = []
    with h5py.File(path, "r") as file:
        data = file["data"]
        values, indices = data["values"][...], data["row_indices"][...]
        sizes = iter(data["col_sizes"][...]) if "col_sizes" in data else iter(())
        for i in range(len(values)):
            if "col_offsets" in data:
                offsets = data["col_offsets"][i]
            else:
                offsets = np.cumsum([0, *(next(sizes) for _ in range(data["ranks"][i]))])
            dense = np.zeros((len(offsets) - 1, data.attrs["n_parameters"]), np.float32)
            for row, (first, last) in enumerate(pairwise(offsets)):
                assert (np.diff(indices[i, first:last]) > 0).all()
                dense[row, indices[i, first:last]] = values[i, first:last]
            rows.append(dense)
        assert next(sizes, None) is None
    return rows


@pytest.mark.parametrize("name", ["file", "variable_file"])
def test_an_imported_file_is_exported_as_it_was(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    path = request.getfixturevalue(name)
    export_run(import_fishers(path, tmp_path / "run").path, tmp_path / "b.h5")
    for mine, theirs in zip(read_rows(tmp_path / "b.h5"), read_rows(path), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    with h5py.File(path) as a, h5py.File(tmp_path / "b.h5") as b:
        assert set(a["data"]) == set(b["data"])
        assert dict(a["data"].attrs) == dict(b["data"].attrs)
        for array in set(a["data"]) - {"values"}:
            np.testing.assert_array_equal(a["data"][array], b["data"][array])
            assert a["data"][array].dtype == b["data"][array].dtype


def native_run(path: Path, with_logits: bool = True) -> RunDirectory:
    """A run as `npeff fishers` leaves it, with random Fishers of 9 examples, of which one is not valid."""
    n, rank, dim, shard_size = 9, 2, 11, 4
    config = RunConfig.model_validate(
        {"run_dir": str(path), "task": {"name": "t"}, "factorization": {"n_components": K}}
    )
    run = RunDirectory.create(config)
    sizes = {"n_examples": n, "rank": rank, "dim": dim, "n_classes": C, "shard_size": shard_size}
    attrs = {"sketch": {"kind": "tensorsketch", "dim": dim, "seed": 0}}
    store = FisherStore.create(run.fishers, **sizes, store_dtype="float32", attrs=attrs, with_logits=with_logits)
    records = ShardRecords(run.shard_records, "signature")
    rng = np.random.default_rng(0)
    for shard, (start, stop) in enumerate(store.plan):
        valid = np.arange(start, stop) != 5
        arrays = {
            "factors": rng.normal(size=(stop - start, rank, dim)) * valid[:, None, None],
            "frobenius_norms": rng.uniform(1, 4, stop - start) * valid,
            "grams": np.zeros((stop - start, rank, rank)),
            "ranks": rank * valid,
            "logits": rng.normal(size=(stop - start, C)),
            "labels": rng.integers(C, size=stop - start),
            "valid": valid,
            "kept_trace": np.ones(stop - start),
            "losses": np.zeros(stop - start, np.float32),
        }
        checksum = store.write_shard(shard, {name: arrays[name] for name in store.array_names})
        records.write(CompletionRecord(shard, start, stop, checksum, 0, 0.0, "signature"))
    run.complete("fishers", {"signature": "signature", "n_shards": store.plan.n_shards})
    return run


def test_fishers_of_a_run_are_exported_over_its_coordinates(tmp_path: Path) -> None:
    run = native_run(tmp_path / "run")
    arrays = FisherStore.open(run.fishers).read_rows(np.arange(9))
    whole = arrays["factors"] * np.sqrt(arrays["frobenius_norms"])[:, None, None]
    export_fishers(run.path, tmp_path / "all.h5")
    rows = read_rows(tmp_path / "all.h5")
    assert [len(some) for some in rows] == [2, 2, 2, 2, 2, 0, 2, 2, 2]
    for i in set(range(9)) - {5}:
        np.testing.assert_allclose(rows[i], whole[i], rtol=1e-6)
    export_fishers(run.path, tmp_path / "some.h5", n_values=7)
    for mine, dense in zip(read_rows(tmp_path / "some.h5"), whole, strict=True):
        if len(mine):
            kept = np.abs(dense) >= np.sort(np.abs(dense), axis=None)[-7]
            np.testing.assert_allclose(mine, dense * kept, rtol=1e-6)
    with h5py.File(tmp_path / "some.h5") as file:
        assert file["data/values"].shape == (9, 7)
        assert dict(file["data"].attrs) == {"n_parameters": 11, "min_prob_class": 0.0}
        np.testing.assert_allclose(file["data/pef_frobenius_norms"], arrays["frobenius_norms"], rtol=1e-6)
    again = import_fishers(tmp_path / "all.h5", tmp_path / "again")
    factors = FisherStore.open(again.fishers).read_rows(np.arange(9))["factors"]
    np.testing.assert_allclose(factors, arrays["factors"], rtol=1e-5, atol=1e-7)


def test_fishers_that_are_not_there_are_not_exported(tmp_path: Path) -> None:
    run = native_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="n_values = 0"):
        export_fishers(run.path, tmp_path / "a.h5", n_values=0)
    with pytest.raises(StoreError, match="has no logits"):
        export_fishers(native_run(tmp_path / "sequences", with_logits=False).path, tmp_path / "a.h5")
    (run.shard_records / "00001.json").unlink()
    with pytest.raises(StoreError, match=r"shard 1 of .* has no record: run `npeff fishers"):
        export_fishers(run.path, tmp_path / "a.h5")
    run.reopen("fishers")
    with pytest.raises(RunDirectoryError, match="not complete"):
        export_fishers(run.path, tmp_path / "a.h5")
    with pytest.raises(RunDirectoryError, match="no run in"):
        export_fishers(tmp_path / "none", tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


@pytest.fixture(scope="module")
def decomposition(tmp_path_factory: pytest.TempPathFactory, pefs: Pefs) -> tuple[Path, np.ndarray, np.ndarray]:
    """A file with coefficients (N, K) and components (K, P) in full coordinates, one component of them 0."""
    rng = np.random.default_rng(4)
    columns = np.flatnonzero(np.abs(np.concatenate(pefs.rows)).any(axis=0))[::-1][:60]
    g_KM = rng.normal(size=(K, 60))
    g_KM[2] = 0
    w_NK = rng.uniform(0, 0.01, size=(N, K)) * (rng.uniform(size=(N, K)) < 0.7)
    path = write_decomposition(tmp_path_factory.mktemp("lrm") / "decomposition.h5", w_NK, g_KM, columns)
    g_KP = np.zeros((K, P))
    g_KP[:, columns] = g_KM.astype(np.float32)
    return path, w_NK.astype(np.float32), g_KP


def test_a_decomposition_and_its_fishers_become_a_factorized_run(
    tmp_path: Path, file: Path, pefs: Pefs, decomposition: tuple[Path, np.ndarray, np.ndarray]
) -> None:
    path, w_NK, g_KP = decomposition
    run = serial(import_run(path, tmp_path / "run", fishers=file))
    found = open_factorization(run.factorization)
    h_KD, coefficients_NK = found.read_components(), found.read_coefficients()
    np.testing.assert_allclose(np.linalg.norm(h_KD, axis=1), [1, 1, 0, 1])
    columns = FisherStore.open(run.fishers).attrs["sketch"]["indices"]
    mine = np.einsum("nk,kd,ke->nde", coefficients_NK[:5].astype(float), h_KD, h_KD)
    theirs = np.einsum("nk,kd,ke->nde", w_NK[:5].astype(float), g_KP[:, columns], g_KP[:, columns])
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-9)
    # the loss is that of the definition, in full coordinates
    squares = residuals = 0.0
    for rows, w_K in zip(pefs.normalised, w_NK.astype(float), strict=True):
        fisher = rows.astype(float).T @ rows
        squares += np.square(fisher).sum()
        residuals += np.square(fisher - (g_KP.T * w_K) @ g_KP).sum()
    record = recorded(run, FACTORIZE)
    assert record is not None
    assert record["loss"] == pytest.approx(residuals, rel=1e-5)
    assert record["explained"] == pytest.approx(1 - residuals / squares, rel=1e-4)
    assert {row.stage: str(row.state) for row in status(run)} == {
        "fishers": "complete", "spectrum": "missing", "factorize": "complete", "lift": "missing", "verify": "missing",
        "attribute": "missing", "report": "missing",
    }  # fmt: skip
    npeff.spectrum(run)
    statistics = read_table(run.table("spectrum_statistics"), "spectrum_statistics").to_pylist()
    (trace,) = [row["value"] for row in statistics if row["name"] == "trace" and row["n_examples"] == N]
    assert trace == pytest.approx(np.mean([np.square(rows.astype(float)).sum() for rows in pefs.rows]), rel=1e-5)
    assert npeff.factorize(run)["stopped"] == "imported"
    top = ComponentStore.open(run.path).top_examples(1, n=4)["example"].to_pylist()
    assert top == np.argsort(-w_NK[:, 1], kind="stable")[:4].tolist()
    assert "imported" in npeff.report(run).read_text(encoding="utf-8")


def test_a_decomposition_alone_can_be_asked_too(
    tmp_path: Path, decomposition: tuple[Path, np.ndarray, np.ndarray]
) -> None:
    path, w_NK, _ = decomposition
    run = import_factorization(path, tmp_path / "run")
    assert recorded(run, FACTORIZE) is not None
    assert recorded(run, FISHERS) is None
    store = ComponentStore.open(run.path)
    assert store.top_examples(3, n=2)["example"].to_pylist() == np.argsort(-w_NK[:, 3], kind="stable")[:2].tolist()
    assert store.similar_components(0).num_rows == K - 1
    with pytest.raises(RunDirectoryError, match="import it again, with its Fishers"):
        export_fishers(run.path, tmp_path / "a.h5")
    assert npeff.report(run).exists()
    assert import_factorization(path, tmp_path / "run").path == run.path
    assert npeff.check(run) == []
    (run.path / "provenance.json").write_text("{")
    assert npeff.check(serial(run), recompute=True) == []
    (run.factorization / "components/c/0/0").unlink()
    (damaged,) = npeff.check(run, recompute=True)
    assert damaged.what == "factorization"
    assert "import the file again" in damaged.remedy
    assert run.factorization.exists()


@pytest.mark.parametrize("imported", ["Fishers", "decomposition with its Fishers", "decomposition alone"])
def test_a_changed_bit_in_a_table_of_an_imported_run_is_found(
    tmp_path: Path, file: Path, decomposition: tuple[Path, np.ndarray, np.ndarray], imported: str
) -> None:
    if imported == "Fishers":
        run = import_fishers(file, tmp_path / "run")
        stages, tables = ["fishers"], ["classes", "examples", "parameters"]
    else:
        alone = imported == "decomposition alone"
        run = import_factorization(decomposition[0], tmp_path / "run", fishers=None if alone else file)
        stages = ["factorize"] if alone else ["fishers", "factorize"]
        tables = ["classes", "coefficients", "components", "examples", "history", "parameters", "top_examples"]
    assert sorted(path.stem for path in run.path.rglob("tables/*.parquet")) == tables
    assert npeff.check(run) == []
    for name in tables:
        whole = run.table(name).read_bytes()
        changed = bytearray(whole)
        changed[whole.rindex(b"parquet-cpp-arrow")] ^= 1  # in the file's footer, which Parquet has no checksum of
        run.table(name).write_bytes(changed)
        (damage,) = npeff.check(run)
        assert (damage.what, damage.remedy) == (f"table {name}", "import the file again, into a new run_dir")
        run.table(name).write_bytes(whole)
    for stage in stages:
        record = run.record_file(stage)
        whole = record.read_bytes()
        record.write_bytes(whole.replace(b'"seconds": ', b'"seconds": 1'))
        assert f"record of {stage}" in [damage.what for damage in npeff.check(run)]
        record.write_bytes(whole)
    assert npeff.check(run) == []


def test_a_factorization_is_exported_and_imported_unchanged(tmp_path: Path, file: Path) -> None:
    run = serial(import_fishers(file, tmp_path / "run", options=ImportOptions(n_components=K)))
    summary = npeff.factorize(run)
    export_run(run.path, tmp_path / "d.h5", what="factorization")
    before = open_factorization(run.factorization)
    columns = FisherStore.open(run.fishers).attrs["sketch"]["indices"]
    with h5py.File(tmp_path / "d.h5") as exported:
        np.testing.assert_array_equal(exported["data/W"], before.read_coefficients())
        np.testing.assert_array_equal(exported["data/G"], before.read_components().astype(np.float32))
        np.testing.assert_array_equal(exported["data/new_to_old_col_indices"], columns)
        assert dict(exported["data"].attrs) == {"n_parameters": P, "n_classes": C}
        assert exported["losses/joint"][-1] == pytest.approx(summary["loss"], rel=0.05)
        assert exported["losses"].attrs["log_loss_frequency"] == 1
    again = import_factorization(tmp_path / "d.h5", tmp_path / "again", fishers=file)
    after = open_factorization(again.factorization)
    np.testing.assert_array_equal(after.read_coefficients(), before.read_coefficients())
    np.testing.assert_allclose(after.read_components(), before.read_components(), atol=1e-7)
    export_factorization(again.path, tmp_path / "e.h5")
    with h5py.File(tmp_path / "d.h5") as a, h5py.File(tmp_path / "e.h5") as b:
        np.testing.assert_array_equal(a["data/W"], b["data/W"])
        np.testing.assert_allclose(a["data/G"], b["data/G"], atol=1e-7)


def test_a_decomposition_of_other_fishers_is_refused(
    tmp_path: Path, file: Path, pefs: Pefs, decomposition: tuple[Path, np.ndarray, np.ndarray]
) -> None:
    rng = np.random.default_rng(0)
    unused = np.flatnonzero(~np.abs(np.concatenate(pefs.rows)).any(axis=0))[:5]
    w_NK = rng.uniform(size=(N, K))
    elsewhere = write_decomposition(tmp_path / "a.h5", w_NK, rng.normal(size=(K, 5)), unused)
    with pytest.raises(StoreError, match="5 parameters without values in the Fishers") as caught:
        import_factorization(elsewhere, tmp_path / "a", fishers=file)
    assert_one_line(caught.value)
    fewer = write_decomposition(tmp_path / "b.h5", w_NK[:-1], rng.normal(size=(K, 5)), unused)
    with pytest.raises(StoreError, match=f"has {N - 1} examples") as caught:
        import_factorization(fewer, tmp_path / "b", fishers=file, options=ImportOptions(max_dim=1))
    assert_one_line(caught.value)
    with pytest.raises(ConfigError, match="give fishers only with a decomposition"):
        import_run(file, tmp_path / "c", fishers=file)
    with pytest.raises(StoreError, match="give an LRM-PEF"):
        import_factorization(decomposition[0], tmp_path / "d", fishers=decomposition[0])


def test_diagonal_fishers_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["data/fisher/values"] = np.zeros((2, 2), np.float32)
    with h5py.File(tmp_path / "h.h5", "w") as file:
        file["data/W"], file["data/H"] = np.ones((3, 2), np.float32), np.ones((2, 2), np.float32)
        file["data/reduce_kept_indices"] = np.array([0, 1])
        file["data"].attrs["full_dense_size"] = [5]
    for name in ("d.h5", "h.h5"):
        with pytest.raises(StoreError, match="diagonal Fishers, which cannot be imported") as caught:
            import_run(tmp_path / name, tmp_path / "run")
        assert_one_line(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_memory_of_an_import_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interchange, "_SHARD_NUMBERS", 1 << 16)
    v, p = 50_000, 100_000
    rng = np.random.default_rng(0)

    def peak_bytes(n: int) -> int:
        with h5py.File(tmp_path / f"{n}.h5", "w") as file:
            file["data/labels"] = np.zeros(n, np.int32)
            file["data/logits"] = np.zeros((n, 2), np.float32)
            file["data/values"] = rng.normal(size=(n, v)).astype(np.float32)
            file["data/row_indices"] = rng.integers(p, size=(n, v), dtype=np.int32)
            file["data/col_offsets"] = np.tile(np.array([0, v // 2, v], np.int32), (n, 1))
            file["data/pef_frobenius_norms"] = np.full(n, 10.0 * v, np.float32)
            file["data"].attrs.update({"n_classes": 2, "n_parameters": p})
        tracemalloc.start()
        import_fishers(tmp_path / f"{n}.h5", tmp_path / str(n), options=ImportOptions(max_dim=1, dim=2048))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    block = 1 << 20
    assert peak_bytes(4 * block // v) < 1.1 * peak_bytes(block // v)


def test_memory_of_an_import_does_not_grow_with_the_stated_number_of_parameters(tmp_path: Path, pefs: Pefs) -> None:
    path = write_pefs(tmp_path / "pefs.h5", pefs)
    with h5py.File(path, "r+") as opened:
        opened["data"].attrs["n_parameters"] = 2**31 - 1
    tracemalloc.start()
    run = import_fishers(path, tmp_path / "run")
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()
    assert FisherStore.open(run.fishers).attrs["sketch"]["n_parameters"] == 2**31 - 1
