"""Questions about subsets, neighbours and other runs against slow definitions, in stores of one and many row groups."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.store import tables as stored_tables
from npeff.store.fisher_store import FisherStore
from places import place
from scipy import stats

CONDITIONS = {
    "label = 2 and not correct": lambda row: row["label"] == 2 and not row["correct"],
    "WRITER = 'writer 3' or ink > 20": lambda row: row["writer"] == "writer 3" or row["ink"] > 20,
    "label_name = '7' and prediction_name != label_name": lambda row: row["label"] == 7 != row["prediction"],
    "text is null and id like '%4'": lambda row: row["id"].endswith("4"),
    "example in (select example from coefficients where component = 4)": None,
    "loss > 0": lambda row: False,
}


@pytest.fixture(scope="module")
def finely_grouped(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, its tables in groups of 7 rows."""
    path = tmp_path_factory.mktemp("fine") / "digits"
    shutil.copytree(run.path, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_tables, "_GROUP_ROWS", (7, 7))
        for name in ("examples", "coefficients", "components", "layer_energy"):
            table = pq.read_table(path / place(f"tables/{name}.parquet"))
            stored_tables.write_table(path / place(f"tables/{name}.parquet"), name, table)
    assert pq.ParquetFile(path / place("tables/coefficients.parquet")).num_row_groups > 100
    return path


@pytest.fixture(scope="module")
def former(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as version 1 wrote it: plain Parquet without metadata, chunks of Zarr in files of their own."""
    path = tmp_path_factory.mktemp("former") / "digits"
    shutil.copytree(run.path, path)
    for file in path.rglob("*.parquet"):
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file, write_page_checksum=True)
        assert b"npeff.schema_version" not in (pq.read_metadata(file).metadata or {})
    group = zarr.open_group(path / place("factorization.zarr"), mode="r+")
    checksums = dict(group.attrs["checksums"])
    del group["coefficient_norms"], group["coefficients"], checksums["coefficient_norms"]
    group.attrs["checksums"] = checksums
    del group.attrs["seal"]  # there was none
    old = group.create_array("coefficients", shape=run.coefficients.shape, dtype="f4", chunks=(100, 12),
                             compressors=zarr.codecs.Crc32cCodec(), fill_value=np.nan)  # fmt: skip
    old[...] = run.coefficients
    return path


@pytest.fixture(params=["of one group", "of many groups", "of version 1"])
def store(request: pytest.FixtureRequest, run) -> ComponentStore:
    places = {"of one group": lambda: run.path, "of many groups": lambda: request.getfixturevalue("finely_grouped")}
    place = places.get(request.param, lambda: request.getfixturevalue("former"))
    return ComponentStore.open(place())


@pytest.fixture(scope="module")
def weights(run) -> np.ndarray:
    return np.nan_to_num(run.coefficients).astype(np.float64)


def rows_where(run, condition: str, weights: np.ndarray) -> np.ndarray:
    holds = CONDITIONS[condition]
    if holds is None:
        return weights[:, 4] > 0
    return np.array(
        [bool(holds(row)) for row in pq.read_table(run.path / place("tables/examples.parquet")).to_pylist()]
    )


@pytest.mark.parametrize("condition", CONDITIONS)
def test_top_examples_that_meet_a_condition(store: ComponentStore, run, weights: np.ndarray, condition: str) -> None:
    marked = rows_where(run, condition, weights)
    np.testing.assert_array_equal(store.examples_where(condition), marked)
    for split in (None, "held_out"):
        among = marked if split is None else marked & (run.split == split)
        for n in (3, 1000):
            expected = [i for i in np.argsort(-weights[:, 4], kind="stable") if weights[i, 4] > 0 and among[i]][:n]
            found = store.top_examples(4, n, split, condition)
            assert found["example"].to_pylist() == expected
            assert found["rank"].to_pylist() == list(range(len(expected)))
            assert found["id"].to_pylist() == [f"digit-{i:04d}" for i in expected]
            np.testing.assert_array_equal(found["coefficient"], weights[expected, 4])


def test_an_examples_components_with_their_ranks(store: ComponentStore, weights: np.ndarray) -> None:
    for example in (0, 40, 359):
        found = store.example(example)
        components = found["component"].to_pylist()
        assert sorted(components) == np.flatnonzero(weights[example]).tolist()
        np.testing.assert_array_equal(found["coefficient"], weights[example, components])
        assert found["rank"].to_pylist() == [int((weights[:, j] > weights[example, j]).sum()) for j in components]


def test_neighbours_are_sorted_by_the_cosine_of_their_coefficients(
    store: ComponentStore, run, weights: np.ndarray
) -> None:
    norms = np.linalg.norm(weights, axis=1)
    for example, where, split in ((40, None, None), (7, "label = 2", None), (7, None, "fit")):
        cosines = np.divide(weights @ weights[example], norms * norms[example], out=np.zeros(360), where=norms > 0)
        marked = np.ones(360, bool) if where is None else store.examples_where(where)
        marked &= (run.split == split) | (split is None)
        shared = ((weights > 0) & (weights[example] > 0)).sum(axis=1)
        expected = np.sort(cosines[marked & (shared > 0) & (np.arange(360) != example)])[::-1][:15]
        found = store.neighbours(str(example), 15, split, where)
        np.testing.assert_allclose(found["cosine"], expected, atol=1e-12)
        np.testing.assert_allclose(cosines[found["example"].to_numpy()], expected, atol=1e-12)
        assert found["shared_components"].to_pylist() == shared[found["example"].to_numpy()].tolist()


@pytest.mark.parametrize(("top", "split"), [(None, None), (9, None), (None, "held_out"), (5, "fit")])
def test_enrichment_is_fishers_exact_test_of_each_components_table(
    store: ComponentStore, run, weights: np.ndarray, top: int | None, split: str | None
) -> None:
    condition = "label = 2 or ink > 22"
    subset, among = store.examples_where(condition), run.valid & ((run.split == split) | (split is None))
    found = {row["component"]: row for row in store.enriched(condition, split=split, top=top).to_pylist()}
    assert sorted(found) == list(range(12))
    p_values = []
    for component in range(12):
        row, w = found[component], weights[:, component]
        ranked = [i for i in np.argsort(-w, kind="stable") if w[i] > 0 and among[i]][:top]
        has = np.isin(np.arange(360), ranked)
        table = [[int((among & a & b).sum()) for b in (subset, ~subset)] for a in (has, ~has)]
        test = stats.fisher_exact(table, alternative="greater")
        p_values.append(test.pvalue)
        assert [row["n_in_subset"], row["n_outside"]] == table[0]
        np.testing.assert_allclose(row["p_value"], test.pvalue, rtol=1e-9)
        np.testing.assert_allclose(row["odds_ratio"], test.statistic)
        np.testing.assert_allclose(row["share_in_subset"], has[subset & among].mean())
        np.testing.assert_allclose(row["share_outside"], has[~subset & among].mean())
        np.testing.assert_allclose(row["mean_in_subset"], w[subset & among].mean())
        np.testing.assert_allclose(row["mean_outside"], w[~subset & among].mean())
    expected = stats.false_discovery_control(p_values)
    np.testing.assert_allclose([found[k]["q_value"] for k in range(12)], expected, rtol=1e-9)
    in_order = store.enriched(condition, split=split, top=top, n=4)["p_value"].to_pylist()
    assert in_order == sorted(row["p_value"] for row in found.values())[:4]


def test_energy_by_parameter_and_by_layer(store: ComponentStore) -> None:
    rows = [row for row in store.table("layer_energy").to_pylist() if row["component"] == 5]
    by_parameter = store.layer_energy(5)
    assert by_parameter.to_pylist() == [
        {"parameter": row["parameter"], "energy": row["energy"]} for row in sorted(rows, key=lambda row: -row["energy"])
    ]
    by_layer = store.layer_energy(5, by="layer")
    for layer, energy in zip(by_layer["layer"].to_pylist(), by_layer["energy"].to_pylist(), strict=True):
        assert energy == pytest.approx(sum(row["energy"] for row in rows if row["parameter"].startswith(f"{layer}.")))
    assert by_layer["layer"].to_pylist()[0] in ("conv1", "conv2", "norm", "head")
    assert sum(by_layer["energy"].to_pylist()) == pytest.approx(1)


def test_the_verified_rows_of_a_component(store: ComponentStore) -> None:
    rows = [row for row in store.table("verification").to_pylist() if row["component"] == 2]
    assert store.verification(2).to_pylist() == rows
    assert len(rows) == 4
    assert store.verification(11).num_rows == 0


def with_fishers(path: Path, **changes: object) -> ComponentStore:
    attrs = {"sketch": {"seed": 0}, "parameter_layout": ["w"], "model_fingerprint": "abc", **changes}
    shutil.rmtree(path / "fishers.zarr", ignore_errors=True)
    FisherStore.create(path / "fishers.zarr", n_examples=4, rank=1, dim=64, n_classes=2, shard_size=4,
                       store_dtype="float32", attrs=attrs)  # fmt: skip
    return ComponentStore.open(path)


def test_components_of_another_run_are_found_by_cosine_and_only_in_the_same_space(
    make_run: Callable, finely_grouped: Path, run
) -> None:
    mine, path = with_fishers(finely_grouped), make_run(n_components=4).path
    other = with_fishers(path)
    found = mine.similar_components_in(other, 7, n=3)
    theirs = other.components.compute()
    cosines = theirs @ run.components[7] / np.linalg.norm(theirs, axis=1)
    expected = np.argsort(-np.abs(cosines))[:3]
    assert found["component"].to_pylist() == expected.tolist()
    np.testing.assert_allclose(found["cosine"], cosines[expected])
    np.testing.assert_allclose(found["abs_cosine"], np.abs(cosines[expected]))
    for changes, said in (
        ({"sketch": {"seed": 1}}, "sketch or seed"),
        ({"parameter_layout": ["v"], "model_fingerprint": "x"}, "parameters, model"),
    ):
        with pytest.raises(
            QueryError,
            match=f"^the components of .* are not comparable, because the runs differ in {said}: choose a run",
        ):
            mine.similar_components_in(with_fishers(path, **changes), 7)
    (path / place("stages/factorize.json")).write_text(json.dumps({"factorized": "diagonal_groups"}))
    with pytest.raises(
        QueryError,
        match=r"diagonal_groups, which are not in the sketch: only components in the sketch can be compared$",
    ):
        mine.similar_components_in(with_fishers(path), 7)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("labl = 2", "examples have no column 'labl': did you mean label or label_name?"),
        ('label = "x"', "examples have no column 'x': the columns are example, id, label,"),
        ("label = ", "is not valid SQL: Parser Error"),
        ("", "is not valid SQL: Parser Error"),
        ("label, correct", "Expected a single expression"),
        ("label = 2; drop table examples", "Parser Error"),
        ("1=1) union select 1 --", "Parser Error"),
        ("label = 'two'", "Could not convert string 'two' to INT64"),
        ("sum(label) > 2", "WHERE clause cannot contain aggregates"),
        ("id in (select * from read_text('/etc/passwd'))", "file system operations are disabled"),
        ("label = 99", "the condition is true for none of the 358 valid examples: give one that selects a part"),
        ("true", "the condition is true for all of the 358 valid examples: give one that selects a part"),
    ],
)
def test_a_condition_that_is_none_is_one_line(run, condition: str, said: str) -> None:
    with pytest.raises(QueryError) as caught:
        ComponentStore.open(run.path).enriched(condition)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_questions_that_make_no_sense_are_one_line(run) -> None:
    store = ComponentStore.open(run.path)
    for question, said in (
        (lambda: store.neighbours(0, n=0), "the number of examples must be at least 1, not 0"),
        (lambda: store.enriched("label = 2", top=0), "the number of top examples must be at least 1, not 0"),
        (lambda: store.layer_energy(0, by="module"), "by must be parameter or layer, not 'module'"),
        (lambda: store.layer_energy(12), "there is no component 12"),
        (lambda: store.verification(-1), "there is no component -1"),
        (lambda: store.neighbours(5), "example 5 has no coefficients"),
    ):
        with pytest.raises(QueryError, match=f"^{said}"):
            question()


def test_a_table_of_a_later_version_is_refused_in_one_line(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    file = path / place("tables/examples.parquet")
    later = pq.read_table(file).replace_schema_metadata({"npeff.schema_version": "6"})
    pq.write_table(later, file)
    with pytest.raises(QueryError, match=r"has schema version 6, but this program .* up to 5: install the version"):
        ComponentStore.open(path).top_examples(0)


def test_a_chunk_of_coefficients_that_is_damaged_is_named(make_run: Callable) -> None:
    path = make_run(n_components=4).path
    chunk = path / place("factorization.zarr") / "coefficients" / "c" / "0" / "0"
    content = chunk.read_bytes()
    for damage in (content[:20] + bytes([content[20] ^ 1]) + content[21:], None):
        chunk.unlink() if damage is None else chunk.write_bytes(damage)
        with pytest.raises(
            QueryError, match=r"coefficients of .* are corrupt: delete this store and run `npeff factorize"
        ):
            ComponentStore.open(path).example(3)


def test_answers_become_data_frames(run) -> None:
    pytest.importorskip("pandas")
    frame = ComponentStore.open(run.path).top_examples(0, 5).to_pandas()
    assert frame["coefficient"].is_monotonic_decreasing
    assert isinstance(ComponentStore.open(run.path).table("components"), pa.Table)
