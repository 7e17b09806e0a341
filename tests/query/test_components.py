from __future__ import annotations

import json
import shutil
from collections.abc import Callable

import dask.array as da
import numpy as np
import pyarrow.parquet as pq
import pytest
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.reports.report import render_report
from npeff.store.schemas import SCHEMAS, columns_since
from npeff.store.tables import read_table
from places import place


@pytest.fixture
def store(run) -> ComponentStore:
    return ComponentStore.open(run.path)


def test_arrays_are_lazy_and_equal_what_was_stored(store: ComponentStore, run) -> None:
    assert isinstance(store.coefficients, da.Array)
    assert isinstance(store.components, da.Array)
    np.testing.assert_array_equal(store.coefficients.compute(scheduler="synchronous"), run.coefficients)
    np.testing.assert_array_equal(store.components.compute(scheduler="synchronous"), run.components)
    assert store.directions["conv2.weight"].shape == (12, 24, 12, 3, 3)


@pytest.mark.parametrize("split", [None, "fit", "held_out"])
@pytest.mark.parametrize("n", [1, 7, 10_000])
def test_top_examples_are_those_with_the_largest_coefficients(store: ComponentStore, run, split, n) -> None:
    weights = np.nan_to_num(run.coefficients).astype(np.float64)
    if split:
        weights[run.split != split] = 0.0
    for component in (0, 5, 11):
        expected = [i for i in np.argsort(-weights[:, component], kind="stable")[:n] if weights[i, component] > 0]
        found = store.top_examples(component, n, split)
        assert found["example"].to_pylist() == expected
        assert found["rank"].to_pylist() == list(range(len(expected)))
        np.testing.assert_array_equal(found["coefficient"], weights[expected, component])


def test_top_examples_are_described_but_not_drawn(store: ComponentStore) -> None:
    found = store.top_examples(3, 5)
    assert not {"image", "logits"} & set(found.column_names)
    for row in found.to_pylist():
        assert row["id"] == f"digit-{row['example']:04d}"
        assert row["writer"] == f"writer {row['example'] % 13}"
        assert row["label_name"] == str(row["label"])
        assert row["correct"] == (row["label"] == row["prediction"])


def test_an_example_is_found_by_row_number_by_id_and_by_its_number_as_text(store: ComponentStore, run) -> None:
    weights = np.nan_to_num(run.coefficients).astype(np.float64)
    found = store.example(40)
    assert found.equals(store.example("digit-0040"))
    assert found.equals(store.example("40"))
    components = found["component"].to_pylist()
    assert sorted(components) == np.flatnonzero(weights[40]).tolist()
    np.testing.assert_array_equal(found["coefficient"], np.sort(weights[40][weights[40] > 0])[::-1])
    np.testing.assert_allclose(sum(found["share"].to_pylist()), 1.0)
    assert found["rank"].to_pylist() == [int((weights[:, j] > weights[40, j]).sum()) for j in components]


def test_similar_components_are_sorted_by_absolute_cosine(store: ComponentStore, run) -> None:
    found = store.similar_components(2, n=4)
    cosines = run.components @ run.components[2]
    others = [j for j in np.argsort(-np.abs(cosines)) if j != 2][:4]
    assert found["component"].to_pylist() == others
    np.testing.assert_allclose(found["cosine"], cosines[others], atol=1e-12)
    tops = {j: set(store.top_examples(j, 32, "fit")["example"].to_pylist()) for j in [2, *others]}
    tops = {j: top | set(store.top_examples(j, 32, "held_out")["example"].to_pylist()) for j, top in tops.items()}
    assert found["shared_top_examples"].to_pylist() == [len(tops[2] & tops[j]) for j in others]


def test_a_single_component_is_similar_to_nothing(make_run: Callable) -> None:
    store = ComponentStore.open(make_run(n_components=1).path)
    assert store.similar_components(0, n=10).num_rows == 0


def test_the_components_table_carries_the_verified_rows_of_the_informative_sign(store: ComponentStore) -> None:
    table = {row["component"]: row for row in store.components_table().to_pylist()}
    for row in store.table("verification").to_pylist():
        if row["informative"]:
            found = table[row["component"]]
            assert found[f"kl_ratio_matched_{row['examples']}"] == row["kl_ratio_matched"]
            control = max(row["trace_ratio"], row["random_kl_ratio"], row["other_kl_ratio"])
            assert found[f"best_control_{row['examples']}"] == control
            assert found[f"matched_{row['examples']}"] is row["matched"]
    assert table[11]["kl_ratio_matched_fit"] is None


def test_a_table_of_an_earlier_version_keeps_its_signs_apart(make_run: Callable) -> None:
    path = make_run().path / place("tables/verification.parquet")
    rows = pq.read_table(path)
    former = rows.drop_columns([name for name in rows.column_names if name in columns_since("verification", 2)])
    pq.write_table(former.replace_schema_metadata({"npeff.table": "verification", "npeff.schema_version": "2"}), path)
    store = ComponentStore.open(path.parents[3])
    table = {row["component"]: row for row in store.components_table().to_pylist()}
    for row in former.to_pylist():
        suffix = f"{row['examples']}_{'plus' if row['sign'] > 0 else 'minus'}"
        assert table[row["component"]][f"kl_ratio_{suffix}"] == row["kl_ratio"]
        control = max(row["fisher_norm_ratio"], row["random_kl_ratio"], row["other_kl_ratio"])
        assert table[row["component"]][f"best_control_{suffix}"] == control
    assert [(score["examples"], score["sign"]) for score in store.summary()["verification"]] == [
        ("held_out", 1), ("held_out", -1), ("fit", 1), ("fit", -1),
    ]  # fmt: skip
    assert "KL divergence on random baseline examples" in render_report(store, 4)
    assert read_table(path, "verification").schema == SCHEMAS["verification"]


def test_the_summary_counts_what_is_there_and_is_json(store: ComponentStore) -> None:
    summary = json.loads(json.dumps(store.summary()))
    assert summary["n_examples"] == 360
    assert summary["n_invalid"] == 2
    assert summary["n_fit"] == 240
    assert summary["n_held_out"] == 118
    assert summary["n_components"] == 12
    assert summary["n_dead_components"] == 1
    assert summary["explained"] == 0.667
    assert summary["explained_held_out"] == 0.581
    found = [(s["examples"], s["sign"], s["n"], s["n_not_matched"]) for s in summary["verification"]]
    assert found == [("held_out", None, 10, 1), ("fit", None, 11, 0)]


def test_questions_that_make_no_sense_get_one_line(store: ComponentStore, run) -> None:
    questions: list[tuple[Callable[[], object], str]] = [
        (lambda: store.top_examples(12), "there is no component 12: this run has components 0 to 11"),
        (lambda: store.similar_components(-1), "there is no component -1: this run has components 0 to 11"),
        (lambda: store.top_examples(0, n=0), "the number of examples must be at least 1, not 0"),
        (lambda: store.similar_components(0, n=-3), "the number of components must be at least 1, not -3"),
        (lambda: store.top_examples(0, split="test"), "there is no split 'test': choose fit or held_out"),
        (lambda: store.example(360), "there is no example 360: give an id or a row number below 360"),
        (lambda: store.example("\udcff"), 'there is no example "\\udcff": give an id or a row number below 360'),
        (lambda: store.example("x\ny"), 'there is no example "x\\ny": give an id or a row number below 360'),
        (lambda: store.example(5), "example 5 has no coefficients: its logits or gradients were not finite"),
        (lambda: ComponentStore.open(run.path / "tables"), "tables is not a run directory: it has no run.yaml"),
        (lambda: ComponentStore.open("/nowhere"), "/nowhere does not exist: give the directory"),
    ]
    for question, line in questions:
        with pytest.raises(QueryError) as caught:
            question()
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)


def test_arrays_that_are_not_there_yet_name_the_command_that_writes_them(make_run: Callable) -> None:
    path = make_run(n_components=3).path
    shutil.rmtree(path / place("factorization.zarr"))
    shutil.rmtree(path / place("directions.zarr"))
    with pytest.raises(
        QueryError, match=f"^factorization.zarr does not exist yet: run `npeff factorize {path}` first$"
    ):
        _ = ComponentStore.open(path).coefficients
    with pytest.raises(QueryError, match=f"^directions.zarr does not exist yet: run `npeff lift {path}` first$"):
        _ = ComponentStore.open(path).directions


def test_a_damaged_factorization_is_one_line(make_run: Callable) -> None:
    path = make_run(n_components=3).path
    (path / place("factorization.zarr") / "zarr.json").write_text("{}")
    with pytest.raises(QueryError, match=r"factorization\.zarr"):
        _ = ComponentStore.open(path).coefficients
