"""The natural-gradient step: a damped step of the definition, judged on examples that had no part in it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gradients.dense_definition import dense_fishers
from in_process import refused
from npeff.execution.executor import WorkerSpec
from npeff.execution.serial import SerialExecutor
from npeff.gradients import select_parameters
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.step.fisher_worker import FisherWorker
from npeff.stages.step.worker import StepWorker
from npeff.statistics.mcnemar import mcnemar
from npeff.store.array_files import read_arrays
from npeff.store.tables import read_table
from places import write_configuration
from safetensors import safe_open
from safetensors.torch import load_file
from stages.small_net import N, SmallNet, document, prepared
from torch import Tensor

STEP = {"damping": 0.05, "tolerance": 1e-9, "max_harm": 0.2}


@pytest.fixture(scope="module")
def fishers(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return prepared(tmp_path_factory.mktemp("step") / "run", step=STEP)


@pytest.fixture(scope="module")
def stepped(fishers: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = copied(fishers, tmp_path_factory.mktemp("stepped") / "run")
    npeff.step(run)
    return run


def copied(run: RunDirectory, path: Path, executor: dict[str, Any] | None = None, **step: Any) -> RunDirectory:
    shutil.copytree(run.path, path)
    changes = {} if executor is None else {"executor": executor}
    write_configuration(path, RunConfig.model_validate(document(path, step={**STEP, **step}, **changes)))
    return RunDirectory.open_any(path)


def fitted(run: RunDirectory) -> np.ndarray:
    return np.array(read_table(run.table("examples"), "examples")["split"].to_pylist()) == "fit"


def natural_gradient(examples: list[int], classes: list[int], fit_N: np.ndarray, damping: float) -> dict[str, Tensor]:
    """The definition, with nothing of the package but the rows' definition."""
    task = SmallNet()
    model = task.model(Path())
    layout = select_parameters(model)
    batches = [task.batch([number]) for number in np.flatnonzero(fit_N)]
    fisher = dense_fishers(model, task.logits, layout, batches).mean(0)
    loss = torch.nn.functional.cross_entropy(model(task.batch(examples)), torch.tensor(classes))
    g = torch.cat([value.flatten() for value in torch.autograd.grad(loss, list(model.parameters()))])
    solved = torch.linalg.solve(fisher + damping * torch.eye(len(g), dtype=torch.float64), g)
    parts = solved.split(list(layout.sizes))
    return {name: part.reshape(shape) for name, shape, part in zip(layout.names, layout.shapes, parts, strict=True)}


def is_model_after(run: RunDirectory, direction: dict[str, Tensor], size: float) -> None:
    saved = load_file(run.stepped / "model.safetensors")
    for name, value in SmallNet().model(Path()).named_parameters():
        torch.testing.assert_close(saved[name], value - size * direction[name], rtol=1e-8, atol=1e-8)


def right(run: RunDirectory, examples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    task = SmallNet()
    model, labels = task.model(Path()), np.array(task.labels())[examples]
    before = model(task.batch(examples.tolist())).argmax(-1).numpy() == labels
    model.load_state_dict(load_file(run.stepped / "model.safetensors"))
    return before, model(task.batch(examples.tolist())).argmax(-1).numpy() == labels


def test_the_step_is_the_one_of_the_definition_and_is_judged_on_held_out_examples(stepped: RunDirectory) -> None:
    summary, fit_N = stepped.record("step"), fitted(stepped)
    assert summary is not None
    labels = np.array(SmallNet().labels())
    examples = np.flatnonzero(fit_N)
    direction = natural_gradient(examples.tolist(), labels[examples].tolist(), fit_N, STEP["damping"])
    is_model_after(stepped, direction, summary["step"])
    before, after = right(stepped, np.flatnonzero(~fit_N))
    expected = mcnemar(before, after)
    assert {name: summary["held_out"][name] for name in ("n", "broken", "mended")} == {
        "n": expected.n, "broken": expected.broken, "mended": expected.mended
    }  # fmt: skip
    rows = read_table(stepped.shared_table("step"), "step").to_pylist()
    (chosen,) = [row for row in rows if row["chosen"]]
    before, after = right(stepped, examples)
    assert chosen["accuracy_tuning"] == pytest.approx(after.mean())
    assert chosen["gained"] == after.sum() - before.sum() > 0
    assert chosen["gained"] == max(row["gained"] for row in rows)
    assert chosen["loss"] < summary["loss_before"]
    model, batch = SmallNet().model(Path()), SmallNet().batch(examples.tolist())
    before_log = model(batch).log_softmax(-1)
    model.load_state_dict(load_file(stepped.stepped / "model.safetensors"))
    after_log = model(batch).log_softmax(-1)
    of_definition = (after_log.exp() * (after_log - before_log)).sum(-1).mean().item()
    assert chosen["kl"] == pytest.approx(of_definition, rel=1e-5)
    assert chosen["kl"] in [pytest.approx(kl, rel=0.011) for kl in stepped.config.step.kl_steps]


def test_the_edited_model_has_the_format_of_a_repair(stepped: RunDirectory) -> None:
    with safe_open(stepped.stepped / "model.safetensors", "pt") as file:
        record = json.loads(file.metadata()["npeff"])
    assert record == json.loads((stepped.stepped / "step.json").read_text())
    summary = stepped.record("step")
    assert summary is not None
    assert record["held_out"] == summary["held_out"]
    assert npeff.step(stepped) == summary, "a complete stage is not repeated"


def labels_file(path: Path, examples: list[Any], labels: Any, key: str = "id") -> Path:
    pq.write_table(pa.table({key: examples, "label": labels}), path)
    return path


def test_given_labels_and_a_given_size(fishers: RunDirectory, tmp_path: Path) -> None:
    examples, fit_N = [40, 3, 17], fitted(fishers)
    outside = np.flatnonzero(~fit_N)[:2].tolist()
    examples, classes = [*examples, *outside], [1, 2, 0, 3, 3]
    for key, values in (("id", [f"x{number}" for number in examples]), ("example", examples)):
        file = labels_file(tmp_path / f"{key}.parquet", values, pa.array(classes, pa.int8()), key)
        run = copied(fishers, tmp_path / key, towards=str(file), step_size=0.5, damping=0.3)
        summary = npeff.step(run)
        assert summary["step"] == 0.5
        assert summary["n_labelled"] == 5
        assert summary["held_out"]["n"] == (~fit_N).sum() - len(set(examples) & set(np.flatnonzero(~fit_N)))
        is_model_after(run, natural_gradient(examples, classes, fit_N, 0.3), 0.5)


@pytest.mark.parametrize("kind", ["diagonal", "kfac", "low_rank"])
def test_the_other_kinds(kind: Any, fishers: RunDirectory, tmp_path: Path) -> None:
    run = copied(fishers, tmp_path / "run", kind=kind, rank=4, step_size=0.1)
    summary = npeff.step(run)
    assert summary["iterations"] is None
    assert summary["loss_after"] < summary["loss_before"]


def interrupted(method: str, worker: type, at: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    computed, calls = getattr(worker, method), []

    def dying(self: Any, item: Any) -> Any:
        calls.append(item.number)
        if len(calls) == at:
            raise KeyboardInterrupt
        return computed(self, item)

    monkeypatch.setattr(worker, method, dying)
    return calls


def test_an_interrupted_step_goes_on_to_the_same_end(
    fishers: RunDirectory, stepped: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, expected = copied(fishers, tmp_path / "run"), stepped.record("step")
    assert expected is not None
    passes = interrupted("products", FisherWorker, 5 * 4 + 2, monkeypatch)  # 5 shards: in the fourth iteration
    trials = interrupted("trial", StepWorker, 3, monkeypatch)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            npeff.step(run)
    assert not run.stepped.exists()
    summary = npeff.step(run)
    assert len(passes) == 5 * (1 + expected["iterations"]) + 2, "finished iterations are not repeated"
    assert sorted(trials) == [0, 1, 2, 2, 3, 4, 5], "and finished trials are not"
    for name in ("step", "iterations", "held_out", "loss_after", "model_checksum"):
        assert summary[name] == expected[name]


def test_other_labels_are_another_step(stepped: RunDirectory, tmp_path: Path) -> None:
    run, former = copied(stepped, tmp_path / "run"), stepped.record("step")
    assert former is not None
    file = labels_file(tmp_path / "labels.parquet", ["x1", "x2"], [0, 0])
    other = run.with_config(run.config.with_step(towards=str(file), step_size=1.0))
    assert npeff.step(other)["model_checksum"] != former["model_checksum"]
    assert npeff.step(run)["model_checksum"] == former["model_checksum"]


def test_a_step_that_helps_nothing_leaves_no_model(fishers: RunDirectory, tmp_path: Path) -> None:
    predictions = SmallNet().model(Path())(SmallNet().batch(range(N))).argmax(-1).tolist()
    file = labels_file(tmp_path / "labels.parquet", list(range(N)), predictions, "example")
    run = copied(fishers, tmp_path / "run", towards=str(file))
    assert npeff.step(run)["step"] is None
    assert not run.stepped.exists()


class TwoWorkers(SerialExecutor):
    """Two workers that finish their items in another order than one worker does."""

    workers = 2

    def map(self, spec: WorkerSpec, method: str, items: Iterable[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
        first, second = spec.construct(), spec.construct()
        found = [(item, getattr((first, second)[n % 2], method)(item)) for n, item in enumerate(items)]
        yield from reversed(found)


def test_the_step_depends_neither_on_the_worker_nor_on_the_order_of_the_parts(
    fishers: RunDirectory, stepped: RunDirectory, tmp_path: Path
) -> None:
    summary, expected = npeff.step(copied(fishers, tmp_path / "run"), executor=TwoWorkers()), stepped.record("step")
    assert expected is not None
    assert summary["model_checksum"] == expected["model_checksum"]


@pytest.mark.ray
def test_two_workers_take_the_same_step(fishers: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = str(Path(__file__).parents[1])  # where the workers find the task
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]))
    directions = []
    for name, executor in {"one": None, "two": {"kind": "ray", "workers": 2}}.items():
        run = copied(fishers, tmp_path / name, executor, tolerance=0.1, step_size=0.5)
        npeff.step(run)
        directions.append(read_arrays(run.partial_results("step") / "direction.safetensors")[0])
    for name, values in directions[0].items():
        np.testing.assert_allclose(directions[1][name], values, rtol=1e-6, atol=1e-9)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_damage_is_found_and_the_same_step_is_taken_again(fishers: RunDirectory, tmp_path: Path) -> None:
    file = labels_file(tmp_path / "labels.parquet", ["x1", "x2"], [0, 0])
    run = copied(fishers, tmp_path / "run")
    former = npeff.step(run.with_config(run.config.with_step(towards=str(file), step_size=1.0, kind="diagonal")))
    assert npeff.check(run) == []
    flip(run.stepped / "model.safetensors")
    flip(run.partial_results("step") / "direction.safetensors")
    found = [part.what for part in npeff.check(run)]
    assert found == ["direction of the step", "model after the step"]
    assert npeff.check(run, recompute=True) == []
    again = run.record("step")
    assert again is not None
    assert again["model_checksum"] == former["model_checksum"]
    assert npeff.check(run) == []


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "text": (lambda path: path.write_text("id,label\nx1,0\n"), "is not a Parquet file: give a Parquet file with"),
    "columns": (lambda path: pq.write_table(pa.table({"id": ["x1"]}), path), "has the columns id: give a Parquet file"),
    "no rows": (lambda path: labels_file(path, pa.array([], pa.string()), pa.array([], pa.int64())), "has no rows"),
    "names": (lambda path: labels_file(path, ["x1"], ["a"]), "column label must have a class number"),
    "null": (lambda path: labels_file(path, ["x1", "x2"], [0, None]), "column label must have a class number"),
    "negative": (lambda path: labels_file(path, ["x1"], [-1]), "column label must have a class number"),
    "large": (lambda path: labels_file(path, ["x1"], [4]), "the label of example 1 is 4, and the model has the"),
    "huge": (lambda path: labels_file(path, ["x1"], pa.array([2**64 - 100], pa.uint64())), "must have a class number"),
    "lists": (lambda path: labels_file(path, [[0]], [0], "example"), "column example must have whole numbers"),
    "structs": (lambda path: labels_file(path, [{"a": 1}], [0]), "column id must have texts"),
    "unknown id": (lambda path: labels_file(path, ["x1", "y"], [0, 1]), "has no example with id 'y': give examples of"),
    "unknown number": (lambda path: labels_file(path, [N], [0], "example"), f"has no example with example {N}"),
    "twice": (lambda path: labels_file(path, ["x1", "x1"], [0, 1]), "has an example twice"),
}


@pytest.mark.parametrize("kind", FILES)
def test_bad_labels_are_refused(
    kind: str, fishers: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write, said = FILES[kind]
    write(tmp_path / "labels.parquet")
    run = copied(fishers, tmp_path / "run")
    assert said in refused(capfd, "step", run.path, "--towards", tmp_path / "labels.parquet")
    assert not run.record_file("step").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--damping", "0"), "step.damping"),
        (("--damping", "nan"), "step.damping"),
        (("--damping", "-1"), "step.damping"),
        (("--step-size", "inf"), "step.step_size"),
        (("--kind", "whole"), "step.kind"),
    ],
)
def test_bad_options_are_refused(
    options: tuple[str, ...], said: str, fishers: RunDirectory, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said.split(".")[1] in refused(capfd, "step", fishers.path, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--step-size", "1e300"), "are not finite: use a smaller step_size"),
        (("--damping", "1e300"), "has the length 0 in the precision of the model: use another damping"),
    ],
)
def test_steps_beyond_the_precision_are_refused(
    options: tuple[str, ...], said: str, fishers: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = copied(fishers, tmp_path / "run")
    assert said in refused(capfd, "step", run.path, "--kind", "diagonal", *options)


def test_runs_that_do_not_fit_are_refused(
    fishers: RunDirectory, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(fishers, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(SmallNet, "shift", 0.1)
        assert "another model than the one of the stored Fishers" in refused(capfd, "step", run.path)
    with monkeypatch.context() as patched:
        patched.setattr(SmallNet, "labels", lambda self: [None] * N)
        unlabelled = prepared(tmp_path / "unlabelled")
        assert "give labels with --towards FILE" in refused(capfd, "step", unlabelled.path)
    empirical = prepared(tmp_path / "empirical", fishers={"labels": "empirical"})
    assert "use a run with another fishers.labels" in refused(capfd, "step", empirical.path)
    empirical.record_file("fishers").unlink()
    assert "run `npeff fishers" in refused(capfd, "step", empirical.path)
