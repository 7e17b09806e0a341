"""The stage `inputs` on digits, a table and texts: values, invariances, resumption, damage, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from end_to_end.commands import Command
from in_process import command, refused
from npeff.execution.executor import WorkerSpec
from npeff.input_fisher.noise import InputCovarianceError
from npeff.input_fisher.opponents import OPPONENTS
from npeff.models.loaded import LoadedModel
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.runs.config import RunConfig
from npeff.runs.config_input_sections import InputsConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.stages.earlier_results import fingerprint_of
from npeff.stages.inputs.examples import Block
from npeff.stages.inputs.worker import InputWorker
from npeff.stages.worker_specs import model_spec
from npeff.store.array_files import read_arrays
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table
from npeff.tasks import Inputs, TaskError

TABLES = ("inputs", "input_shares", "input_groups")
READ = FisherStore.read_attributes
N = 110
DIGITS = {"name": "digits", "options": {"limit": N, "epochs": 3}}


def config(path: Path, task: dict[str, Any] = DIGITS, **sections: Any) -> RunConfig:
    document: dict[str, Any] = {
        "run_dir": str(path),
        "task": task,
        "fishers": {"sketch": {"kind": "tensorsketch", "dim": 128}, "shard_size": 30},
        "factorization": {"n_components": 3, "n_starts": 1, "max_iterations": 5, "stability_examples": 0},
        "report": {"top_examples": 5},
        "inputs": {"samples": 4},
        "executor": {"kind": "serial"},
    }
    for name, values in sections.items():
        document[name] = document.get(name, {}) | values
    return RunConfig.model_validate(document)


def factorized(path: Path, **sections: Any) -> RunDirectory:
    run = RunDirectory.create(config(path, **sections))
    npeff.compute_fishers(run)
    npeff.factorize(run)
    return run


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A factorized run on digits, without the stage."""
    return factorized(tmp_path_factory.mktemp("inputs") / "run")


@pytest.fixture(scope="module")
def explained(digits: RunDirectory) -> RunDirectory:
    copy = copied(digits, digits.path.with_name("explained"))
    npeff.inputs(copy)
    return copy


def copied(run: RunDirectory, path: Path, **inputs: Any) -> RunDirectory:
    shutil.copytree(run.path, path)
    return RunDirectory.create(config(path, inputs=inputs)) if inputs else RunDirectory.open(path)


def rows(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_table(run.table(name), name).to_pylist()
    return found


def contents(run: RunDirectory) -> dict[str, bytes]:
    paths = [*(run.table(name) for name in TABLES), run.input_covariance]
    return {path.name: path.read_bytes() for path in paths}


def test_the_covariance_is_that_of_the_fitted_examples(explained: RunDirectory) -> None:
    loaded = model_spec(explained, fingerprint_of(explained)).load()
    examples = read_table(explained.table("examples"), "examples")
    fitted = np.flatnonzero(np.asarray(examples["split"].to_pylist()) == "fit")
    pixels = loaded.batch(fitted.tolist()).double().flatten(1).numpy()
    arrays = read_arrays(explained.input_covariance)[0]
    np.testing.assert_allclose(arrays["mean"].ravel(), pixels.mean(0), rtol=1e-12)
    expected = np.cov(pixels, rowvar=False)
    expected += 1e-4 * np.diag(np.diag(expected))
    np.testing.assert_allclose(arrays["joint"] @ arrays["joint"].T, expected, rtol=1e-9, atol=1e-12)


def test_the_information_is_that_of_a_dense_computation(explained: RunDirectory) -> None:
    loaded = model_spec(explained, fingerprint_of(explained)).load()
    factor = read_arrays(explained.input_covariance)[0]["joint"]
    row = rows(explained, "inputs")[3]
    model, x = loaded.model.double(), loaded.batch([row["example"]]).double()
    predicted = int(model(x).argmax())
    parts = []
    for draw in range(4):
        bits = np.random.Philox(key=np.array([0, row["example"]], np.uint64), counter=[0, 0, draw, 1])
        noise = 0.15**0.5 * factor @ np.random.Generator(bits).standard_normal(64)
        z = (x + torch.from_numpy(noise).view(x.shape)).requires_grad_()
        f = model(z).softmax(-1)[0, predicted]
        g = torch.autograd.grad(f, z)[0].flatten().numpy()
        parts.append(0.15 * (factor @ (factor.T @ g)) * g / f.item() / 2)
    expected = np.mean(parts, axis=0)
    assert (row["class"], row["n_samples"], row["shape"]) == (predicted, 4, [8, 8])
    assert row["information"] == pytest.approx(expected.sum(), rel=1e-4)
    shares = [each for each in rows(explained, "input_shares") if each["example"] == row["example"]]
    assert [each["position"] for each in shares] == list(range(64))
    np.testing.assert_allclose([each["information"] for each in shares], expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose([each["share"] for each in shares], expected / expected.sum(), rtol=1e-3, atol=1e-5)


def test_the_top_examples_are_explained_and_shares_sum_to_one(explained: RunDirectory) -> None:
    top = rows(explained, "top_examples")
    expected = sorted({row["example"] for row in top if row["rank"] < 5})
    assert [row["example"] for row in rows(explained, "inputs")] == expected
    for row in rows(explained, "inputs"):
        shares = [each["share"] for each in rows(explained, "input_shares") if each["example"] == row["example"]]
        assert sum(shares) == pytest.approx(1, abs=1e-9)
    assert rows(explained, "input_groups") == []  # a digit has no groups


def test_the_information_bounds_the_mutual_information(digits: RunDirectory, tmp_path: Path) -> None:
    run = copied(digits, tmp_path / "run", samples=40, label="all", examples=20)
    npeff.inputs(run)
    found = rows(run, "inputs")
    assert len(found) == 20
    for row in found:
        assert row["class"] is None
        slack = 3 * np.hypot(row["entropy_se"], row["information_se"])
        assert 0 < row["entropy"] <= row["information"] + slack


class InReverse:
    """An executor of two workers in this process, which take items in reverse order."""

    workers = 2

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **_: Any) -> Iterator[tuple[Any, Any]]:
        made = [spec.worker_class(**spec.arguments) for _ in range(2)]
        for place, item in enumerate(reversed(list(items))):
            yield item, getattr(made[place % 2], method)(item)


def test_the_bits_do_not_depend_on_the_workers(explained: RunDirectory, digits: RunDirectory, tmp_path: Path) -> None:
    other = copied(digits, tmp_path / "run")
    npeff.inputs(other, executor=InReverse())
    assert contents(other) == contents(explained)


def test_an_interrupted_stage_continues_and_ends_with_the_same_bits(
    explained: RunDirectory, digits: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npeff.stages.inputs.stage._BLOCK", 1)  # of 4 examples: the model is small
    whole, killed = copied(digits, tmp_path / "whole"), copied(digits, tmp_path / "killed")
    npeff.inputs(whole)
    compute, computed = InputWorker.compute, list[int]()

    def until_the_third(worker: InputWorker, block: Block) -> int:
        computed.append(block.number)
        if len(computed) == 3:
            raise KeyboardInterrupt
        return compute(worker, block)

    monkeypatch.setattr(InputWorker, "compute", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        npeff.inputs(killed)
    moments = monkeypatch.setattr(InputWorker, "moments", None)  # the covariance is there
    assert moments is None
    npeff.inputs(killed)
    assert sorted(set(computed)) == list(range(len(rows(whole, "inputs")) // 4 + bool(len(rows(whole, "inputs")) % 4)))
    assert contents(killed) == contents(whole)
    assert [row["information"] for row in rows(whole, "inputs")] == pytest.approx(
        [row["information"] for row in rows(explained, "inputs")], rel=1e-5
    )


def test_a_complete_stage_is_not_repeated_and_other_settings_are_computed_again(
    explained: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copy = copied(explained, tmp_path / "run")
    before = contents(copy)
    record = copy.record_file("inputs").read_bytes()
    npeff.inputs(copy)
    assert copy.record_file("inputs").read_bytes() == record
    changed = RunDirectory.create(config(copy.path, inputs={"samples": 4, "spread": 0.3}))
    npeff.inputs(changed)
    other = contents(changed)
    assert other != before
    without = config(copy.path).model_copy(update={"inputs": None})  # the stored section stays
    npeff.inputs(RunDirectory.create(without))
    assert command("inputs", copy.path) == 0
    assert contents(copy) == other
    npeff.inputs(RunDirectory.create(config(copy.path)))
    assert contents(copy) == before
    more = RunDirectory.create(config(copy.path, inputs={"samples": 4, "examples": "all"}))
    npeff.inputs(more)
    assert len(rows(more, "inputs")) == N


def test_damage_is_found_and_recomputed(explained: RunDirectory, tmp_path: Path, capfd: Any) -> None:
    copy = copied(explained, tmp_path / "run")
    before = contents(copy)
    for path in (copy.table("input_shares"), copy.partial_results("inputs") / "00000.parquet", copy.input_covariance):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
    assert command("check", copy.path) != 0
    printed = capfd.readouterr().out
    assert "table input_shares" in printed
    assert "information of block of examples 0" in printed
    assert "input_covariance.safetensors" in printed
    assert command("check", copy.path, "--recompute") == 0
    assert contents(copy) == before


def test_npeff_run_includes_the_stage_only_if_the_run_file_has_the_section(
    explained: RunDirectory, tmp_path: Path, capfd: Any
) -> None:
    from npeff.stages.inputs import INPUTS

    assert INPUTS.in_run(config(tmp_path))
    without = config(tmp_path).model_dump(mode="json") | {"inputs": None}
    assert not INPUTS.in_run(RunConfig.model_validate(without))
    assert command("status", explained.path) == 0
    assert "inputs" in capfd.readouterr().out


def test_queries(explained: RunDirectory, digits: RunDirectory, capfd: Any) -> None:
    store = ComponentStore.open(explained.path)
    example = store.inputs()["example"][0].as_py()
    shares = store.inputs(example=example)
    assert len(shares) == 64
    assert shares["share"].to_pylist() == sorted(shares["share"].to_pylist(), reverse=True)
    means = store.inputs(component=1)
    top = {row["example"] for row in rows(explained, "top_examples") if row["component"] == 1}
    shown = [row for row in rows(explained, "input_shares") if row["example"] in top and row["position"] == 20]
    (mean,) = (row for row in means.to_pylist() if row["position"] == 20)
    assert mean["share"] == pytest.approx(np.mean([row["share"] for row in shown]))
    assert mean["n_examples"] == len(shown) > 0
    missing = next(number for number in range(N) if number not in store.inputs()["example"].to_pylist())
    with pytest.raises(QueryError, match=r"not explained: set inputs.examples to all .* run `npeff inputs"):
        store.inputs(example=missing)
    with pytest.raises(QueryError, match="not both"):
        store.inputs(example=example, component=1)
    with pytest.raises(QueryError, match="run `npeff inputs"):
        ComponentStore.open(digits.path).inputs()
    assert command("query", explained.path, "inputs", "--component", "1", "--format", "json") == 0
    assert json.loads(capfd.readouterr().out)[0]["share"] == means["share"][0].as_py()
    assert "not both" in refused(capfd, "query", explained.path, "inputs", "-c", "1", "-e", "3")


def test_attributions_are_compared_by_one_test(digits: RunDirectory, tmp_path: Path) -> None:
    run = copied(digits, tmp_path / "run", faithfulness={"examples": 5, "steps": 4}, samples=4)
    npeff.inputs(run)
    scores, means = rows(run, "faithfulness_scores"), rows(run, "faithfulness")
    splits = read_table(run.table("examples"), "examples")["split"].to_pylist()
    tested = {row["example"] for row in scores}
    assert len(tested) == 5
    assert {splits[example] for example in tested} == {"held_out"}
    assert tested <= {row["example"] for row in rows(run, "inputs")}
    methods = {"functional_information", *OPPONENTS}
    assert {(row["method"], row["metric"], row["replacement"]) for row in means} == {
        (method, metric, replacement)
        for method in methods
        for metric, replacement in [
            *((curve, name) for curve in ("deletion", "insertion") for name in ("mean", "resample")),
            ("information", "resample"),
            ("information", "given_the_rest"),
        ]
    }
    ours: dict[tuple[str, str], dict[int, float]] = {}
    by_key: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in scores:
        by_key.setdefault((row["method"], row["metric"], row["replacement"]), {})[row["example"]] = row["score"]
        if row["method"] == "functional_information":
            ours.setdefault((row["metric"], row["replacement"]), {})[row["example"]] = row["score"]
    for row in means:
        values = by_key[row["method"], row["metric"], row["replacement"]]
        assert row["n_examples"] == 5
        assert row["mean"] == pytest.approx(np.mean(list(values.values())))
        assert row["low"] <= row["mean"] <= row["high"]
        differences = [ours[row["metric"], row["replacement"]][example] - values[example] for example in values]
        expected = None if row["method"] == "functional_information" else pytest.approx(np.mean(differences))
        assert row["difference"] == expected
    known = {(row["method"], row["replacement"]) for row in means if row["knows_replacement"]}
    assert known == {
        ("functional_information", "given_the_rest"),
        ("integrated_gradients_mean", "mean"),
        ("occlusion", "mean"),
    }
    passes = {row["method"]: row["passes_per_example"] for row in means}
    assert (passes["functional_information"], passes["occlusion"], passes["random"]) == (8, 65, 0)


def test_covariances_that_cannot_be_computed_are_refused(digits: RunDirectory, tmp_path: Path, capfd: Any) -> None:
    run = copied(digits, tmp_path / "run", scope="class")
    message = r"class '0' has \d+ fitted examples .* covariance needs 128: set inputs.scope to all"
    with pytest.raises(InputCovarianceError, match=message):
        npeff.inputs(run)
    assert not run.record_file("inputs").exists()
    refused(capfd, "inputs", run.path)


def test_a_covariance_of_each_class(digits: RunDirectory, tmp_path: Path) -> None:
    run = copied(digits, tmp_path / "run", scope="class", covariance="diagonal", label="label", samples=2)
    npeff.inputs(run)
    labels = read_table(run.table("examples"), "examples")["label"].to_pylist()
    assert all(row["class"] == labels[row["example"]] for row in rows(run, "inputs"))
    arrays = read_arrays(run.input_covariance)[0]
    assert {name.rpartition(" ")[0] for name in arrays} == {
        f"class {labels[row['example']]}" for row in rows(run, "inputs")
    }


def test_labels_that_are_missing_are_refused(digits: RunDirectory, tmp_path: Path) -> None:
    run = copied(digits, tmp_path / "run", label="label")
    path = run.table("examples")
    table = pq.read_table(path)
    column = table.schema.get_field_index("label")
    pq.write_table(table.set_column(column, table.schema.field("label"), pa.nulls(len(table), pa.int64())), path)
    with pytest.raises(ConfigError, match=r"inputs.label: label needs labels, and 12 of 12|examples have none"):
        npeff.inputs(run)


class WithoutInputs(npeff.Task):
    """Digits as integers, which have no gradient."""

    def __init__(self, **options: Any) -> None:
        from npeff.tasks.digits import DigitsTask

        self._digits = DigitsTask(**options)
        self.prepare, self.model = self._digits.prepare, self._digits.model

    def model(self, cache: Path) -> Any: ...

    def examples(self, cache: Path) -> Any:
        examples = self._digits.examples(cache)
        batch = examples.batch
        examples.batch = lambda indices: (16 * batch(indices)).long()
        return examples

    def logits(self, model: Any, batch: Any) -> Any:
        return model(batch.float() / 16)


def test_a_task_without_real_inputs_is_refused(tmp_path: Path, capfd: Any) -> None:
    task = {"name": "end_to_end.test_inputs:WithoutInputs", "options": {"limit": 30, "epochs": 1}}
    run = factorized(tmp_path / "run", task=task)
    line = refused(capfd, "inputs", run.path)
    assert "has no floating-point inputs: give the task an `inputs` method" in line
    with pytest.raises(TaskError):
        npeff.inputs(run)


def test_examples_whose_gradients_are_not_finite_are_left_out_and_counted(
    digits: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(digits, tmp_path / "run", examples="all", samples=1)
    batch = LoadedModel.batch

    def with_a_nan(loaded: LoadedModel, indices: Any) -> Any:
        values = batch(loaded, indices).clone()
        values[torch.tensor([index == 7 for index in indices])] = torch.nan
        return values

    monkeypatch.setattr(LoadedModel, "batch", with_a_nan)
    record = npeff.inputs(run)
    assert (record["n_examples"], record["n_invalid"]) == (N, 1)
    assert [row["example"] for row in rows(run, "inputs") if row["information"] is None] == [7]
    assert 7 not in {row["example"] for row in rows(run, "input_shares")}
    with pytest.raises(QueryError, match="not finite"):
        ComponentStore.open(run.path).inputs(example=7)


def test_columns_of_a_table_have_names_and_groups(tmp_path: Path) -> None:
    task = {"name": "sklearn-table", "options": {"data": "sklearn:wine", "epochs": 3}}
    run = factorized(tmp_path / "run", task=task)
    npeff.inputs(run)
    shares = rows(run, "input_shares")
    names = {row["token"] for row in shares}
    assert {"alcohol", "proline"} <= names
    groups = rows(run, "input_groups")
    assert {row["group"] for row in groups} == names
    first = [row for row in groups if row["example"] == groups[0]["example"]]
    assert sum(row["share"] for row in first) == pytest.approx(1)
    assert set(ComponentStore.open(run.path).inputs(component=0)["token"].to_pylist()) == names


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_command_with_two_workers_is_continued_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    options = {"name": "digits", "options": {"limit": 600, "epochs": 3}}
    inputs = {"samples": 8, "examples": 320, "faithfulness": {"examples": 160, "steps": 4}}
    whole = factorized(tmp_path / "whole", task=options, inputs=inputs, executor={"kind": "auto"})
    killed = copied_path(whole, tmp_path / "killed")
    npeff.inputs(whole)
    results = killed.partial_results("inputs")
    for attempt, wanted in enumerate((3, 7)):
        with Command("inputs", killed.path, "--workers", "2", log=tmp_path / f"{attempt}.log") as stopped:
            stopped.wait_for(partial(has_blocks, results, wanted), f"{wanted} blocks are written")
            stopped.driver.kill()
    assert not killed.record_file("inputs").exists()
    with Command("inputs", killed.path, "--workers", "2", log=tmp_path / "last.log") as last:
        assert last.exit_code() == 0, last.output
    assert contents(killed) == contents(whole)
    assert killed.table("faithfulness").read_bytes() == whole.table("faithfulness").read_bytes()


def has_blocks(results: Path, wanted: int) -> bool:
    return len(list(results.glob("*.parquet"))) >= wanted


def copied_path(run: RunDirectory, path: Path) -> RunDirectory:
    return RunDirectory.open(shutil.copytree(run.path, path))


@pytest.mark.slow
def test_the_bound_holds_for_every_pair_of_sentences(tmp_path: Path) -> None:
    shared = os.environ.get("NPEFF_SHARED_DATA")
    if shared is None or not Path(shared, "models/minilm-sick").is_dir():
        pytest.skip("needs NPEFF_SHARED_DATA with models/minilm-sick and data/sick")
    task = {
        "name": "huggingface-sequence-classification",
        "options": {
            "model": f"{shared}/models/minilm-sick",
            "data": f"{shared}/data/sick/SICK_test_annotated.txt",
            "text_columns": ["sentence_A", "sentence_B"],
            "label_column": "entailment_judgment",
            "id_column": "pair_ID",
            "max_length": 64,
            "limit": 24,
        },
    }
    inputs = {"samples": 16, "label": "all", "examples": "all", "spread": 1.0}
    parameters = {"include": ["classifier.*"]}
    run = factorized(tmp_path / "run", task=task, inputs=inputs, parameters=parameters)
    npeff.inputs(run)
    found = rows(run, "inputs")
    assert len(found) == 24
    for row in found:
        slack = 3 * np.hypot(row["entropy_se"], row["information_se"])
        assert row["entropy"] <= row["information"] + slack
    tokens = {row["token"] for row in rows(run, "input_shares")}
    assert not tokens & {"[CLS]", "[SEP]", "[PAD]"}
    assert {row["group"] for row in rows(run, "input_groups")} == {"sentence_A", "sentence_B"}
    one_at_a_time = copied_path(run, tmp_path / "small")
    shutil.rmtree(one_at_a_time.partial_results("inputs"))
    one_at_a_time.record_file("inputs").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FisherStore, "read_attributes", lambda path: READ(path) | {"batch_size": 1})
        npeff.inputs(one_at_a_time)
    for mine, theirs in zip(rows(one_at_a_time, "inputs"), found, strict=True):
        assert mine["information"] == pytest.approx(theirs["information"], rel=1e-3, abs=1e-7)


class Sequences(npeff.Task):
    """Two numbers a step for five steps, and a class for each step; the examples differ in their last steps."""

    def model(self, cache: Path) -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Linear(2, 3)

    def examples(self, cache: Path) -> Any:
        return SequenceExamples()

    def logits(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        found: torch.Tensor = model(batch["steps"])
        return found

    def targets(self, batch: Any) -> torch.Tensor:
        steps = torch.arange(5) < batch["length"][:, None]
        return torch.where(steps, -1, -100)

    def inputs(self, model: torch.nn.Module, batch: Any) -> Inputs:
        steps = batch["steps"]
        return Inputs(
            steps,
            lambda values: self.logits(model, batch | {"steps": values}),
            positions=(1,),
            mask=torch.arange(5) < batch["length"][:, None],
            groups=("first", "later"),
            group_of=torch.tensor([0, 1, 1, 1, 1]),
        )


class SequenceExamples(npeff.Examples):
    class_names = ("a", "b", "c")

    def __len__(self) -> int:
        return 40

    def batch(self, indices: Any) -> dict[str, torch.Tensor]:
        rows = [torch.randn(5, 2, generator=torch.Generator().manual_seed(index)) for index in indices]
        return {"steps": torch.stack(rows), "length": torch.tensor([3 + index % 3 for index in indices])}

    def table(self) -> pa.Table:
        return pa.table({"id": [str(i) for i in range(40)], "label": pa.nulls(40, pa.int64())})


def test_examples_with_several_predictions_have_the_information_about_all_of_them(tmp_path: Path, capfd: Any) -> None:
    task = {"name": "end_to_end.test_inputs:Sequences", "options": {}}
    fishers = {"labels": "sampled", "rank": 4, "sketch": {"kind": "identity"}, "shard_size": 20}
    run = factorized(tmp_path / "run", task=task, fishers=fishers, inputs={"samples": 30, "label": "all"})
    npeff.inputs(run)
    for row in rows(run, "inputs"):
        length = 3 + row["example"] % 3
        shares = [each for each in rows(run, "input_shares") if each["example"] == row["example"]]
        assert [each["position"] for each in shares] == list(range(length))
        assert row["entropy"] is None
        assert row["information"] > 0
        groups = {
            each["group"]: each["share"] for each in rows(run, "input_groups") if each["example"] == row["example"]
        }
        assert groups == {"first": pytest.approx(shares[0]["share"]), "later": pytest.approx(1 - shares[0]["share"])}
    again = RunDirectory.create(config(run.path, task=task, fishers=fishers, inputs={"label": "prediction"}))
    with pytest.raises(
        ConfigError, match=r"explains one prediction, and the examples .* have several: set inputs.label"
    ):
        npeff.inputs(again)
    tested = {"label": "all", "faithfulness": {"examples": 3}}
    with pytest.raises(ConfigError, match=r"set inputs\.faithfulness\.examples to 0"):
        npeff.inputs(RunDirectory.create(config(run.path, task=task, fishers=fishers, inputs=tested)))


def test_options_out_of_bounds_are_refused_in_one_line(tmp_path: Path, capfd: Any) -> None:
    for wrong in ("{samples: 0}", "{spread: 0}", "{examples: some}", "{faithfulness: {steps: 1}}", "{covariance: big}"):
        file = tmp_path / "run.yaml"
        text = f"run_dir: {tmp_path}/run\ntask: {{name: digits}}\nfactorization: {{n_components: 3}}\ninputs: {wrong}\n"
        file.write_text(text)
        assert "inputs." in refused(capfd, "inputs", file)


def test_columns_in_other_units_change_nothing(tmp_path: Path) -> None:
    """The columns of the table have standard deviations from 0.002 to 600."""
    task = {"name": "sklearn-table", "options": {"data": "sklearn:breast-cancer", "epochs": 3}}
    run = factorized(tmp_path / "run", task=task, inputs={"examples": 20, "samples": 8})
    npeff.inputs(run)
    means = ComponentStore.open(run.path).sql(
        "select token, avg(share) as share from input_shares group by 1 order by 2"
    )
    assert means["share"][-1].as_py() < 0.5
    for row in rows(run, "inputs"):
        assert row["information"] < 1.5  # nats: log 2 = 0.69 is all that two classes can tell


def test_a_section_without_content_is_the_defaults(digits: RunDirectory, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(config(tmp_path / "run").to_yaml(["run_dir", "task", "factorization"]) + "inputs:\n")
    read = RunConfig.from_yaml(file)
    assert read.inputs == InputsConfig()
    assert read.scale is None
    assert RunConfig.model_validate(yaml.safe_load(read.to_yaml())) == read
    without = read.model_copy(update={"inputs": None})
    assert "inputs:" not in without.to_yaml()


def test_settings_of_a_run_without_lineage_are_compared_too(digits: RunDirectory, tmp_path: Path) -> None:
    run = copied(digits, tmp_path / "run")
    for stage in ("fishers", "factorize"):  # as earlier versions wrote them
        record = json.loads(run.record_file(stage).read_text())
        kept = {key: value for key, value in record.items() if key not in ("lineage", "made_from", "checksum")}
        run.record_file(stage).write_text(json.dumps(kept))
    npeff.inputs(run)
    before = rows(run, "inputs")
    changed = RunDirectory.create(config(run.path, inputs={"samples": 2, "spread": 0.5}))
    npeff.inputs(changed)
    assert [row["n_samples"] for row in rows(changed, "inputs")] == [2] * len(before)


def test_other_examples_reopen_the_stage_before_anything_is_written(
    explained: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(explained, tmp_path / "run", examples="all")

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("npeff.stages.inputs.stage._write_tables", killed)
    with pytest.raises(KeyboardInterrupt):
        npeff.inputs(run)
    assert not run.record_file("inputs").exists()


class PaddedSequences(Sequences):
    """The same with present in place of mask; and logits that do not use the values."""

    def __init__(self, ignores: bool = False) -> None:
        self._ignores = ignores

    def inputs(self, model: torch.nn.Module, batch: Any) -> Inputs:
        made = super().inputs(model, batch)
        if self._ignores:
            return replace(made, logits=lambda values: self.logits(model, batch))
        return replace(made, present=made.mask, mask=None)


def test_padding_is_no_input_and_logits_that_ignore_the_values_are_refused(tmp_path: Path, capfd: Any) -> None:
    options = {"fishers": {"labels": "sampled", "rank": 2, "sketch": {"kind": "identity"}, "shard_size": 20}}
    options["inputs"] = {"samples": 4, "label": "all"}
    found = []
    for name in ("Sequences", "PaddedSequences"):
        task = {"name": f"end_to_end.test_inputs:{name}", "options": {}}
        run = factorized(tmp_path / name, task=task, **options)
        npeff.inputs(run)
        found.append([row["information"] for row in rows(run, "inputs")])
    assert found[0] == found[1]
    task = {"name": "end_to_end.test_inputs:PaddedSequences", "options": {"ignores": True}}
    run = factorized(tmp_path / "ignores", task=task, **options)
    assert "do not depend on the values by differentiable operations" in refused(capfd, "inputs", run.path)
