"""Repair: an edit along the components that stand for mistakes, judged on examples that had no part in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
from npeff.cli.main import main
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.stages.earlier_results import fingerprint_of
from npeff.stages.repair import stage as repair_stage
from npeff.stages.repair.directions import RepairDirections, own_directions
from npeff.stages.repair.worker import Batch, RepairWorker
from npeff.stages.worker_specs import model_spec
from npeff.statistics.mcnemar import mcnemar
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import read_table, write_table
from npeff.tasks import load_task
from npeff.verification import Edit, over_represented, top_examples
from places import write_configuration
from safetensors import safe_open
from safetensors.torch import load_file

LIMIT = 400


def config(run_dir: Path, **repair: Any) -> RunConfig:
    """A network that was trained on few examples: it makes many mistakes."""
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "task": {"name": "digits", "options": {"limit": LIMIT, "epochs": 6, "train_examples": 200}},
            "fishers": {"sketch": {"dim": 128}, "shard_size": 100},
            "factorization": {"n_components": 8, "max_iterations": 30, "stability_examples": 0},
            "repair": {"kl_steps": [0.03, 0.1, 0.3], "significance": 0.1, "joint_passes": 0, **repair},
            "executor": {"kind": "serial"},
        }
    )


@pytest.fixture(scope="module")
def lifted(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory.create(config(tmp_path_factory.mktemp("repair") / "run"))
    for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift):
        stage(run)
    return run


@pytest.fixture(scope="module")
def repaired(lifted: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = copied(lifted, tmp_path_factory.mktemp("repaired") / "run")
    npeff.repair(run)
    return run


def copied(run: RunDirectory, path: Path, **repair: Any) -> RunDirectory:
    shutil.copytree(run.path, path)
    write_configuration(path, config(path, **repair))
    return RunDirectory.open(path)


Directions = list[dict[str, torch.Tensor]]


def own_directions_of(run: RunDirectory) -> Directions:
    """The combinations of the stored directions whose sketches are nearest to the components, by least squares."""
    store, facts = DirectionStore.open(run.directions), run.partial_results("lift")
    sketches_KD, stored = store.read_sketches(), stored_directions_of(run)
    assert sketches_KD is not None
    components_KD = open_factorization(run.factorization).read_components().astype(np.float64)
    coefficients_KK = np.linalg.lstsq(sketches_KD.T.astype(np.float64), components_KD.T, rcond=None)[0].T
    coefficients_KK /= np.linalg.norm(coefficients_KK @ sketches_KD, axis=1, keepdims=True)
    lengths = [json.loads((facts / f"{component:05d}.json").read_text())["length"] for component in range(len(stored))]
    return [
        {
            name: sum(a * length * d[name] for a, length, d in zip(row, lengths, stored, strict=True))
            for name in stored[0]
        }
        for row in coefficients_KK
    ]


def stored_directions_of(run: RunDirectory) -> Directions:
    store = DirectionStore.open(run.directions)
    return [
        {name: torch.from_numpy(value) for name, value in store.read(component).items()}
        for component in range(store.n_components)
    ]


def correct(
    run: RunDirectory, edits: list[dict[str, Any]], directions_of: Callable[[RunDirectory], Directions] | None = None
) -> np.ndarray:
    """Which examples the network gets right after the edits, with nothing of the workers' code."""
    task = load_task(run.config.task.name, run.config.task.options)
    model, examples = task.model(run.task_cache), task.examples(run.task_cache)
    directions = (directions_of or own_directions_of)(run)
    with torch.no_grad():
        for edit in edits:
            for name, value in directions[edit["component"]].items():
                model.get_parameter(name).add_(value, alpha=edit["step"])
        predictions = task.logits(model, examples.batch(range(LIMIT))).argmax(-1).numpy()
    return predictions == np.array(examples.table()["label"])


def test_the_edits_are_judged_on_held_out_examples(repaired: RunDirectory) -> None:
    summary = repaired.record("repair")
    assert summary is not None
    assert 1 <= len(summary["edits"]) <= 3
    split = np.array(read_table(repaired.table("examples"), "examples")["split"].to_pylist())
    before, after = correct(repaired, []), correct(repaired, summary["edits"])
    expected = mcnemar(before[split == "held_out"], after[split == "held_out"])
    found = summary["held_out"]
    assert {name: found[name] for name in ("n", "broken", "mended")} == {
        "n": expected.n, "broken": expected.broken, "mended": expected.mended
    }  # fmt: skip
    assert found["change"] == pytest.approx(expected.change)
    assert found["low"] <= found["change"] <= found["high"]
    assert after[split == "fit"].mean() > before[split == "fit"].mean(), "what the edits were chosen by"


def test_components_are_tried_whose_top_examples_are_wrong_too_often(repaired: RunDirectory) -> None:
    table = read_table(repaired.table("examples"), "examples")
    fit = np.array(table["split"].to_pylist()) == "fit"
    wrong = ~np.array(table["correct"].to_pylist(), dtype=bool)
    coefficients_NK = open_factorization(repaired.factorization).read_coefficients()
    expected = over_represented([top_examples(w_N, fit, 64) for w_N in coefficients_NK.T], wrong, fit)
    rows = read_table(repaired.table("repair"), "repair").to_pylist()
    assert sorted(row["component"] for row in rows) == list(range(8))
    assert [row["p_value"] for row in rows] == sorted(row["p_value"] for row in rows)
    for row in rows:
        assert row["q_value"] == pytest.approx(expected.q_values_K[row["component"]])
    steps = read_table(repaired.table("repair_steps"), "repair_steps").to_pylist()
    assert {row["component"] for row in steps} <= {row["component"] for row in rows if row["q_value"] <= 0.1}
    chosen = [row for row in steps if row["chosen"]]
    summary = repaired.record("repair")
    assert summary is not None
    assert [(row["component"], row["sign"] * row["step"]) for row in chosen] == [
        (edit["component"], edit["step"]) for edit in summary["edits"]
    ]
    unedited = before = correct(repaired, [])
    for number, row in enumerate(chosen):
        after = correct(repaired, summary["edits"][: number + 1])
        assert row["accuracy_tuning"] == pytest.approx(after[fit].mean())
        assert row["broken"] == (unedited & ~after)[fit].sum() <= 0.01 * unedited[fit].sum()
        assert row["gained"] == after[fit].sum() - before[fit].sum() > 0
        before = after


def test_the_edited_model_is_saved_with_a_record_and_the_runs_own_is_not_touched(repaired: RunDirectory) -> None:
    summary = repaired.record("repair")
    assert summary is not None
    task = load_task(repaired.config.task.name, repaired.config.task.options)
    model = task.model(repaired.task_cache)
    saved = load_file(repaired.repaired / "model.safetensors")
    directions = own_directions_of(repaired)
    for name, value in model.state_dict().items():
        for edit in summary["edits"]:
            value = value + edit["step"] * directions[edit["component"]][name]
        torch.testing.assert_close(saved[name], value, rtol=1e-5, atol=1e-6)
    with safe_open(repaired.repaired / "model.safetensors", "pt") as file:
        record = json.loads(file.metadata()["npeff"])
    assert record == json.loads((repaired.repaired / "repair.json").read_text())
    assert record["edits"] == summary["edits"]
    assert record["held_out"] == summary["held_out"]


def test_an_interrupted_repair_goes_on_to_the_same_end(
    lifted: RunDirectory, repaired: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied(lifted, tmp_path / "run")
    attempt, calls = RepairWorker.attempt, []

    def dying(worker: RepairWorker, wanted: Any) -> Any:
        calls.append((len(wanted.edits), wanted.component))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attempt(worker, wanted)

    monkeypatch.setattr(RepairWorker, "attempt", dying)
    with pytest.raises(KeyboardInterrupt):
        npeff.repair(run)
    summary, expected = npeff.repair(run), repaired.record("repair")
    assert expected is not None
    assert calls[2] == calls[1], "what was interrupted is done again"
    assert calls.count(calls[0]) == 1, "and what was finished is not"
    assert {name: summary[name] for name in ("edits", "held_out")} == {
        name: expected[name] for name in ("edits", "held_out")
    }
    calls.clear()
    assert npeff.repair(run) == summary
    assert not calls, "a complete stage is not repeated"


def test_another_request_is_another_repair(repaired: RunDirectory, tmp_path: Path) -> None:
    run = copied(repaired, tmp_path / "run", significance=1e-12)
    summary = npeff.repair(run)
    assert summary["edits"] == []
    assert not run.repaired.exists(), "the model of the former one is not left beside this record"


def test_components_that_are_lifted_later_are_tried_too(
    lifted: RunDirectory, repaired: RunDirectory, tmp_path: Path
) -> None:
    run, expected = copied(lifted, tmp_path / "run"), repaired.record("repair")
    assert expected is not None
    edited = {edit["component"] for edit in expected["edits"]}
    other = min(set(range(8)) - edited)
    shutil.rmtree(run.directions)
    shutil.rmtree(run.partial_results("lift"))
    run.reopen("lift")
    few = RunDirectory(run.path, run.config.with_lift(components=(other,)))
    npeff.lift(few)
    along_own = few.config.model_copy(update={"repair": few.config.repair.model_copy(update={"direction": "own"})})
    with pytest.raises(RunDirectoryError, match="directions of all components, and 7 are not lifted: set repair"):
        npeff.repair(RunDirectory(run.path, along_own))
    of_few = npeff.repair(few)
    assert of_few["direction"] == "lifted"
    assert {edit["component"] for edit in of_few["edits"]} <= {other}
    npeff.lift(run)
    of_all = npeff.repair(run)
    assert of_all["direction"] == "own"
    assert {edit["component"] for edit in of_all["edits"]} == edited
    steps, fresh = (
        read_table(each.table("repair_steps"), "repair_steps")["step"].to_numpy() for each in (run, repaired)
    )
    np.testing.assert_allclose(steps, fresh, rtol=1e-3)  # no trial along whitened directions is among them


def test_own_directions_that_are_far_from_the_components_are_not_used(
    lifted: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    factorization = open_factorization(lifted.factorization)
    components_KD = factorization.read_components()
    components_KD[5] = np.random.default_rng(0).standard_normal(components_KD.shape[1])
    monkeypatch.setattr(type(factorization), "read_components", lambda _: components_KD)
    said: list[str] = []
    assert own_directions(lifted, said.append) is None
    assert said[0].startswith("repair: steps along whitened directions, because the directions do not contain")
    along_own = lifted.config.repair.model_copy(update={"direction": "own"})
    along_own = RunDirectory(lifted.path, lifted.config.model_copy(update={"repair": along_own}))
    with pytest.raises(RunDirectoryError, match=r"do not contain component 5: the cosine .* is 0\.[0-7]"):
        own_directions(along_own)


def test_own_directions_are_those_of_a_lift_of_own_directions(lifted: RunDirectory, tmp_path: Path) -> None:
    """The sketch has 128 coordinates, so that the lengths in the sketch are wrong by several percent."""
    document = config(tmp_path / "own").model_dump() | {"lift": {"direction": "own"}}
    shutil.copytree(lifted.path, tmp_path / "own")
    shutil.rmtree(tmp_path / "own" / lifted.directions.relative_to(lifted.path))
    shutil.rmtree(tmp_path / "own" / lifted.partial_results("lift").relative_to(lifted.path))
    write_configuration(tmp_path / "own", RunConfig.model_validate(document))
    own = RunDirectory.open(tmp_path / "own")
    own.reopen("lift")
    npeff.lift(own)
    found = own_directions(lifted)
    assert found is not None
    assert own_directions(own) is None, "stored directions are taken as they are"
    directions = RepairDirections(DirectionStore.open(lifted.directions), found.coefficients_KK)
    pairs = zip(stored_directions_of(own), own_directions_of(lifted), strict=True)
    for component, (expected, mine) in enumerate(pairs):
        direction = directions.of(component)
        products = [sum(float((a[name] * b[name]).sum()) for name in expected) for a, b in [
            (direction, expected), (direction, direction), (direction, mine), (mine, mine)
        ]]  # fmt: skip
        assert products[0] / products[1] ** 0.5 > 0.9999
        assert products[2] == pytest.approx((products[1] * products[3]) ** 0.5, rel=1e-6)
        assert products[1] ** 0.5 == pytest.approx(1, abs=0.1), "of unit length in the sketch"


def test_steps_along_the_stored_directions(lifted: RunDirectory, tmp_path: Path) -> None:
    run = copied(lifted, tmp_path / "run", direction="lifted", significance=1.0, max_edits=1, max_harm=0.2)
    summary = npeff.repair(run)
    assert summary["direction"] == "lifted"
    fit = np.array(read_table(run.table("examples"), "examples")["split"].to_pylist()) == "fit"
    after = correct(run, summary["edits"], stored_directions_of)
    chosen = [row for row in read_table(run.table("repair_steps"), "repair_steps").to_pylist() if row["chosen"]]
    assert len(summary["edits"]) == 1
    assert chosen[-1]["accuracy_tuning"] == pytest.approx(after[fit].mean())


def test_examples_without_labels_cannot_be_repaired(
    lifted: RunDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(lifted, tmp_path / "run")
    examples = read_table(run.table("examples"), "examples").to_pydict()
    examples["correct"] = [None] * LIMIT
    write_table(run.table("examples"), "examples", examples)
    with pytest.raises(SystemExit) as end:
        main(["repair", str(run.path)])
    assert end.value.code == 2
    assert "use examples with known labels and one prediction each" in capsys.readouterr().err
    with pytest.raises(RunDirectoryError, match="have no known labels"):
        npeff.repair(run)


ALL_ONCE = {"significance": 1.0, "max_edits": 1, "kl_steps": [0.1]}
"""Every component is tried, and one is moved along unless steps along all are better."""


def with_steps_at_once(lifted: RunDirectory, path: Path) -> RunDirectory:
    return copied(lifted, path, **ALL_ONCE, joint_passes=30)


def test_steps_at_once_mend_more_than_those_one_after_the_other(lifted: RunDirectory, tmp_path: Path) -> None:
    one_by_one, run = copied(lifted, tmp_path / "one", **ALL_ONCE), with_steps_at_once(lifted, tmp_path / "run")
    npeff.repair(one_by_one)
    summary = npeff.repair(run)
    table = read_table(run.table("examples"), "examples")
    fit = np.array(table["split"].to_pylist()) == "fit"
    before, after = correct(run, []), correct(run, summary["edits"])
    former = one_by_one.record("repair")
    assert former is not None
    assert after[fit].sum() > correct(one_by_one, former["edits"])[fit].sum()
    assert (before & ~after)[fit].sum() <= 0.01 * before[fit].sum()
    assert summary["held_out"]["mended"] == (~before & after)[~fit].sum()
    *steps, last = [row for row in read_table(run.table("repair_steps"), "repair_steps").to_pylist() if row["chosen"]]
    assert last["component"] is None
    assert last["sign"] is None
    assert last["step"] == pytest.approx(np.linalg.norm([edit["step"] for edit in summary["edits"]]))
    assert last["accuracy_tuning"] == pytest.approx(after[fit].mean())
    assert last["edit"] == len(steps)
    assert last["broken"] == (before & ~after)[fit].sum()
    assert {edit["component"] for edit in summary["edits"]} == set(range(8))


def test_steps_at_once_are_the_same_in_any_parts_and_after_an_interruption(
    lifted: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = npeff.repair(with_steps_at_once(lifted, tmp_path / "whole"))
    run = with_steps_at_once(lifted, tmp_path / "run")
    computed, calls = RepairWorker.loss_and_derivatives, []

    def dying(worker: RepairWorker, wanted: Any) -> Any:
        calls.append(wanted.edits)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return computed(worker, wanted)

    monkeypatch.setattr(RepairWorker, "loss_and_derivatives", dying)
    with pytest.raises(KeyboardInterrupt):
        npeff.repair(run)
    assert npeff.repair(run)["edits"] == expected["edits"]
    assert calls[5] == calls[4], "what was interrupted is done again"
    assert calls.count(calls[0]) == 1, "and what was finished is not"
    parts = with_steps_at_once(lifted, tmp_path / "parts")
    monkeypatch.setattr(repair_stage, "_EXAMPLES_AT_ONCE", 97)
    in_parts = [edit["step"] for edit in npeff.repair(parts)["edits"]]
    np.testing.assert_allclose(in_parts, [edit["step"] for edit in expected["edits"]], rtol=0.05, atol=1e-4)


@pytest.mark.parametrize("own", [False, True])
def test_derivatives_of_the_loss_are_those_of_autograd(lifted: RunDirectory, own: bool) -> None:
    found, tuning = own_directions(lifted), np.arange(0, LIMIT, 3)
    assert found is not None
    directions = own_directions_of(lifted) if own else stored_directions_of(lifted)
    worker = RepairWorker(
        model_spec(lifted, fingerprint_of(lifted)),
        lifted.directions,
        lifted.path,
        tuning,
        (0.1,),
        batch_size=16,
        coefficients_KK=found.coefficients_KK if own else None,
    )
    weights = np.linspace(0.1, 1.0, len(tuning))
    edits = (Edit(2, 0.3), Edit(5, -0.2), Edit(7, 0.0))
    loss, derivatives = worker.loss_and_derivatives(Batch(edits, tuning, weights))

    task = load_task(lifted.config.task.name, lifted.config.task.options)
    model, examples = task.model(lifted.task_cache).double(), task.examples(lifted.task_cache)
    labels = torch.tensor(examples.table()["label"].to_pylist())[tuning]
    steps = torch.tensor([edit.step for edit in edits], dtype=torch.float64, requires_grad=True)
    parameters = {
        name: value.detach() + sum(
            step * directions[edit.component][name].double()
            for step, edit in zip(steps, edits, strict=True)
        )
        for name, value in model.named_parameters()
    }  # fmt: skip
    batch = examples.batch(tuning.tolist())
    logits = torch.func.functional_call(model, parameters, (batch.double(),))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="none") @ torch.from_numpy(weights)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert steps.grad is not None
    np.testing.assert_allclose(derivatives, steps.grad.numpy(), rtol=1e-4, atol=1e-5)
