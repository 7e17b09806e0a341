"""The task of tables: its inputs, the network that it trains, models of the user, and refusals."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from npeff.errors import NpeffError
from npeff.models.loaded import ModelSpec
from npeff.tasks import load_task
from npeff.tasks.sklearn_table import SklearnTableTask
from npeff.tasks.tables import TableOptions
from safetensors.torch import save_file
from sklearn import datasets
from torch import nn

SHIPPED = {"breast-cancer": (569, 30, 2), "digits": (1797, 64, 10), "iris": (150, 4, 3), "wine": (178, 13, 3)}
N_ROWS = 60


def linear(n_inputs: int, n_classes: int) -> nn.Module:
    """A model of a user."""
    return nn.Linear(n_inputs, n_classes)


def one_logit(n_inputs: int, n_classes: int) -> nn.Module:
    return nn.Linear(n_inputs, 1)


def no_model(n_inputs: int, n_classes: int) -> int:
    return n_inputs


def rows(**changed: Any) -> pa.Table:
    """Rows with two columns of numbers, one of booleans, one of categories and one of texts."""
    rng = np.random.default_rng(0)
    columns = {
        "key": [f"r{number:03d}" for number in range(N_ROWS)],
        "age": rng.integers(20, 90, N_ROWS),
        "dose": rng.normal(1e3, 50, N_ROWS),
        "smokes": rng.random(N_ROWS) < 0.5,
        "ward": [("north", "south", None)[number % 3] for number in range(N_ROWS)],
        "note": [f"text {number}" for number in range(N_ROWS)],
        "outcome": ["well" if number % 2 else "ill" for number in range(N_ROWS)],
    }
    return pa.table(columns | changed)


def written(folder: Path, table: pa.Table, name: str = "rows.parquet") -> str:
    path = folder / name
    (pyarrow.csv.write_csv if name.endswith(".csv") else pyarrow.parquet.write_table)(table, path)
    return str(path)


def task_of(data: str, **options: Any) -> SklearnTableTask:
    if not data.startswith("sklearn:"):
        options = {"label_column": "outcome", "id_column": "key"} | options
    task = load_task("sklearn-table", {"data": data, **options})
    assert isinstance(task, SklearnTableTask)
    return task


def test_the_page_describes_all_options() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    section = page.split("\n## Tables of numbers and categories\n")[1].split("\n## ")[0]
    described = {
        name for cell in re.findall(r"^\| (`[a-z_`, ]+`) \|", section, re.MULTILINE) for name in cell.split("`")
    }
    own = {each.name for each in fields(SklearnTableTask.Options)} - {each.name for each in fields(TableOptions)}
    assert described - {"", ", "} == own


@pytest.mark.parametrize("name", SHIPPED)
def test_data_sets_of_scikit_learn_are_split_and_learned(name: str, tmp_path: Path) -> None:
    n_rows, n_inputs, n_classes = SHIPPED[name]
    task = task_of(f"sklearn:{name}")
    task.prepare(tmp_path)
    examples, model = task.examples(tmp_path), task.model(tmp_path)
    assert len(examples) == n_rows - round(0.5 * n_rows)
    assert len(examples.class_names) == n_classes
    values = examples.batch(range(len(examples)))
    assert values.shape == (len(examples), n_inputs)
    labels = examples.table()["label"].to_numpy()
    assert (task.logits(model, values).argmax(1).numpy() == labels).mean() > 0.85
    found = getattr(datasets, "load_" + name.replace("-", "_"))()
    positions = [int(each) for each in examples.table()["id"].to_pylist()]
    np.testing.assert_array_equal(values.numpy(), found.data[positions].astype(np.float32))
    named = [examples.class_names[label] for label in labels]
    assert named == [str(found.target_names[number]) for number in found.target[positions]]


def test_the_network_standardizes_the_training_rows_and_its_weights_do_not_depend_on_threads(tmp_path: Path) -> None:
    task = task_of("sklearn:wine")
    task.prepare(tmp_path)
    weights = task.model(tmp_path).state_dict()
    found, inside = datasets.load_wine().data, task.examples(tmp_path).table()["id"].to_pylist()
    training = np.delete(found, [int(each) for each in inside], axis=0)
    np.testing.assert_allclose(weights["mean"], training.mean(0), rtol=1e-6)
    np.testing.assert_allclose(weights["scale"], training.std(0), rtol=1e-6)
    (tmp_path / "again").mkdir()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = task_of("sklearn:wine")
        other.prepare(tmp_path / "again")
    finally:
        torch.set_num_threads(before)
    again = other.model(tmp_path / "again").state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("name", ["rows.parquet", "rows.csv"])
def test_inputs_are_numbers_and_one_column_for_each_category(name: str, tmp_path: Path) -> None:
    table = rows()
    task = task_of(written(tmp_path, table, name), category_columns=["ward"], train_fraction=0.4)
    examples = task.examples(tmp_path)
    shown = examples.table()
    at = [int(each[1:]) for each in shown["id"].to_pylist()]
    assert len(at) == N_ROWS - round(0.4 * N_ROWS)
    ward = np.array(table["ward"].to_pylist())
    expected = np.stack(
        [
            *(table[column].cast(pa.float64()).to_numpy()[at] for column in ("age", "dose", "smokes")),
            *((ward == value)[at] for value in ("north", "south")),
        ],
        axis=1,
    )
    np.testing.assert_allclose(examples.batch(range(len(at))), expected, rtol=1e-6)
    assert examples.class_names == ("ill", "well")
    assert {"age", "dose", "smokes", "note", "ward", "key"} <= set(shown.column_names)
    assert "outcome" not in shown.column_names
    first = next(text for text, place in zip(shown["text"].to_pylist(), at, strict=True) if place % 3 == 0)
    assert first.endswith("ward=north 1")


def test_columns_are_chosen_and_a_constant_one_does_no_harm(tmp_path: Path) -> None:
    data = written(tmp_path, rows(dose=np.full(N_ROWS, 7.0)))
    task = task_of(data, numeric_columns=["dose", "age"])
    task.prepare(tmp_path)
    values = task.examples(tmp_path).batch([0, 1])
    assert values[:, 0].tolist() == [7.0, 7.0]
    assert torch.isfinite(task.logits(task.model(tmp_path), values)).all()


def test_rows_without_a_label_are_examples_and_are_not_trained_on(tmp_path: Path) -> None:
    labels = [None if number < 20 else number % 2 for number in range(N_ROWS)]
    task = task_of(written(tmp_path, rows(outcome=pa.array(labels, pa.int64()))))
    shown = task.examples(tmp_path).table()
    assert set(range(20)) <= {int(each[1:]) for each in shown["id"].to_pylist()}
    assert shown["label"].null_count == 20
    assert len(shown) == N_ROWS - 20


def test_a_model_of_the_user_has_all_rows_as_examples(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = linear(2, 2).state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    task = task_of(
        written(tmp_path, rows()),
        numeric_columns=["age", "dose"],
        model=f"{__name__}:linear",
        weights=str(tmp_path / "weights.safetensors"),
    )
    examples, model = task.examples(tmp_path), task.model(tmp_path)
    assert len(examples) == N_ROWS
    assert torch.equal(model.state_dict()["weight"], weights["weight"])
    values = examples.batch([3, 1])
    torch.testing.assert_close(task.logits(model, values), values @ weights["weight"].T + weights["bias"])


def test_a_run_goes_through_all_stages(tmp_path: Path) -> None:
    document = {
        "run_dir": str(tmp_path / "run"),
        "task": {"name": "sklearn-table", "options": {"data": "sklearn:iris", "hidden": [6], "epochs": 5}},
        "fishers": {"sketch": {"kind": "identity"}},
        "factorization": {"n_components": 3, "max_iterations": 10, "stability_examples": 0},
        "verification": {"top_examples": 4, "baseline_examples": 8},
        "executor": {"kind": "serial"},
    }
    run = npeff.run(npeff.RunConfig.model_validate(document))
    store = npeff.ComponentStore.open(run.path)
    top = store.top_examples(component=0).to_pylist()
    assert top[0]["label_name"] in {"setosa", "versicolor", "virginica"}
    assert "petal length (cm)" in store.metadata_columns()
    assert "petal length (cm)" in run.report.read_text(encoding="utf-8")
    layout = {name.partition(".")[0] for name in store.directions}
    assert layout == {"layers"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"data": "sklearn:titanic"},
            "scikit-learn has no data set 'sklearn:titanic': use one of sklearn:breast-cancer",
        ),
        ({"label_column": None}, "label_column is missing"),
        ({"label_column": "result"}, "has no column 'result'"),
        ({"label_column": "age", "label_names": ["a", "b"]}, "is not one of the model's 2 classes"),
        ({"numeric_columns": ["weight"]}, "has no column 'weight'"),
        ({"numeric_columns": ["note"]}, "column 'note' has type string, not numbers: give it in category_columns"),
        ({"numeric_columns": ["outcome"]}, "'outcome' is the column of labels"),
        ({"numeric_columns": ["age", "dose", "age"]}, "two inputs have the name 'age'"),
        ({"numeric_columns": []}, "has no inputs: give numeric_columns or category_columns"),
        ({"filter": {"outcome": "ill"}}, "has fewer than two classes"),
        ({"limit": 12}, "6 rows to train on and 6 examples are too few"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"hidden": [8, 0]}, "hidden must be a list of widths of at least 1, not [8, 0]"),
        ({"train_fraction": 1.0}, "train_fraction must be between 0 and 1, not 1.0"),
        ({"weights": "w.safetensors"}, "weights belong to a model"),
        ({"model": "defective_tasks:linear", "epochs": 3}, "epochs is an option of the network that the task trains"),
        ({"model": "linear"}, "model 'linear' is not an import path"),
        ({"model": "no_such_module:linear"}, "model 'no_such_module:linear' raised ModuleNotFoundError"),
        ({"model": "{tests}:no_model"}, "returns int, not a torch.nn.Module"),
        ({"model": "{tests}:linear", "weights": "absent.safetensors"}, "weights absent.safetensors: "),
        ({"hidden": "wide"}, "hidden must be a list or null, not 'wide'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    if "model" in options:
        options = options | {"model": options["model"].replace("{tests}", __name__)}

    def use() -> None:
        task = task_of(**{"data": written(tmp_path, rows()), **options})
        task.prepare(tmp_path)
        task.model(tmp_path)

    with pytest.raises(NpeffError) as refused:
        use()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), 1e39])
def test_a_value_that_is_missing_or_not_finite_is_named(value: float | None, tmp_path: Path) -> None:
    dose = pa.array([*np.ones(5), value, *np.ones(N_ROWS - 6)], pa.float64())
    with pytest.raises(NpeffError, match="column 'dose' of row 'r005' is missing or not finite"):
        task_of(written(tmp_path, rows(dose=dose))).prepare(tmp_path)


def test_logits_of_another_shape_are_refused(tmp_path: Path) -> None:
    task = task_of(written(tmp_path, rows()), model=f"{__name__}:one_logit")
    with pytest.raises(NpeffError, match=r"returns \(2, 1\), not \(2, 2\): \(rows, classes\)"):
        task.logits(task.model(tmp_path), task.examples(tmp_path).batch([0, 1]))


def test_a_column_is_a_group_of_inputs(tmp_path: Path) -> None:
    options = {
        "label_column": "outcome",
        "id_column": "key",
        "category_columns": ["ward"],
        "data": written(tmp_path, rows()),
    }
    loaded = ModelSpec("sklearn-table", options, tmp_path, ("*",), (), "cpu")
    loaded.prepare()
    model = loaded.load()
    model.check_inputs([0, 1, 2])
    inputs = model.inputs(model.batch([0, 1, 2]), 3)
    assert list(inputs.names) == ["age", "dose", "smokes", "ward=north", "ward=south"]
    assert list(inputs.groups) == ["age", "dose", "smokes", "ward"]
    assert inputs.group_of is not None
    assert inputs.group_of.tolist() == [0, 1, 2, 3, 3]
    assert (inputs.positions, inputs.mask, inputs.exchangeable) == (None, None, False)
    assert torch.equal(inputs.values, model.batch([0, 1, 2]))


def test_the_inputs_of_a_shipped_table_are_its_columns(tmp_path: Path) -> None:
    spec = ModelSpec("sklearn-table", {"data": "sklearn:digits", "epochs": 1}, tmp_path, ("*",), (), "cpu")
    spec.prepare()
    loaded = spec.load()
    loaded.check_inputs([0, 1])
    inputs = loaded.inputs(loaded.batch([0, 1]))
    assert list(inputs.names) == list(inputs.groups) == [f"pixel_{y}_{x}" for y in range(8) for x in range(8)]
