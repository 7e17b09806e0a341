"""The stage `verify`: predicted and measured effects agree, and permuted groups fail."""

from __future__ import annotations

import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
import yaml
from npeff.errors import NpeffError
from npeff.models.predictions import kl_divergence
from npeff.reports.report import write_report
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import SilentProgress
from npeff.runs.stage import recorded
from npeff.stages.verify import VERIFY, headline, rows
from npeff.stages.verify.options import VerificationOptions, VerificationPaths
from npeff.stages.verify.worker import VerificationWorker
from npeff.stages.worker_specs import model_spec
from npeff.statistics.ratio_intervals import Confidence, Measured, confidence
from npeff.storage.errors import StoreError
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table
from npeff.verification import random_direction
from stages.linear_digits import K

Row = dict[str, Any]


@pytest.fixture(scope="module")
def worker_of(lifted: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VerificationWorker]:
    def make(directions: Path = lifted.directions, **changed: Any) -> VerificationWorker:
        paths = VerificationPaths.of(lifted, tmp_path_factory.mktemp("results"), directions=directions)
        options = VerificationOptions(
            n_top=24,
            n_baseline=50,
            target_kl=0.05,
            epsilon=None,
            n_selectivity=4,
            n_correlation=60,
            seed=0,
            batch_size=64,
        )
        return VerificationWorker(model_spec(lifted, None), paths, replace(options, **changed))

    return make


@pytest.fixture(scope="module")
def fast(worker_of: Callable[..., VerificationWorker]) -> list[Row]:
    worker = worker_of()
    return [row for component in range(K) for row in worker.verify(component)]


@pytest.fixture(scope="module")
def exact(worker_of: Callable[..., VerificationWorker]) -> list[Row]:
    worker = worker_of(exact=True)
    return [row for component in range(K) for row in worker.verify(component)]


def of(rows: list[Row], informative: bool) -> list[Row]:
    return [row for row in rows if row["informative"] is informative]


def test_predicted_and_measured_effects_have_the_same_medians(fast: list[Row], exact: list[Row]) -> None:
    for name, tolerance in [("kl_ratio_matched", 0.05), ("kl_ratio_trace", 0.05), ("kl_ratio", 0.05), ("auc", 0.02)]:
        medians = [statistics.median(row[name] for row in of(rows, True)) for rows in (fast, exact)]
        assert medians[0] == pytest.approx(medians[1], rel=tolerance), name
    pairs = list(zip(of(fast, True), of(exact, True), strict=True))
    for mine, theirs in pairs:
        assert mine["other_kl_ratio"] == pytest.approx(theirs["other_kl_ratio"], rel=0.05)
        assert (mine["sign"], mine["n_matched"]) == (theirs["sign"], theirs["n_matched"])
    assert sum(row["examples_passed"] for row in fast) < 0.6 * sum(row["examples_passed"] for row in exact)


def test_the_step_of_a_linear_model_is_predicted_exactly(fast: list[Row]) -> None:
    for row in of(fast, True):
        assert row["reached_target"]
        assert row["kl_top"] == pytest.approx(0.05, rel=0.011), "the first step tried is the right one"


def test_every_row_is_that_of_its_definition(lifted: RunDirectory, fast: list[Row]) -> None:
    """Recomputed in float64 from the stored directions, with nothing of the worker's code."""
    task = npeff.tasks.load_task(lifted.config.task.name, {})
    model, directions = task.model(lifted.task_cache), DirectionStore.open(lifted.directions)
    pixels_NP = task._pixels.double()  # type: ignore[attr-defined]
    weight, bias = (parameter.detach().double() for parameter in (model.weight, model.bias))
    w_NK = open_factorization(lifted.factorization).read_coefficients()
    split_N = np.array(read_table(lifted.table("examples"), "examples")["split"])
    before_NC = pixels_NP @ weight.T + bias
    predicted_N, p_NC = before_NC.argmax(1), before_NC.softmax(-1)
    for row in fast:
        g = {name: torch.from_numpy(value).double() for name, value in directions.read(row["component"]).items()}
        along_NC = pixels_NP @ g["weight"].T + g["bias"]
        tops = {}
        for split in ("fit", "held_out"):
            ranked = np.flatnonzero((split_N == split) & (w_NK[:, row["component"]] > 0))
            tops[split] = ranked[np.argsort(-w_NK[ranked, row["component"]], kind="stable")[:24]]
        slope_N = along_NC[range(len(p_NC)), predicted_N] - (p_NC * along_NC).sum(1)
        lowers = -1 if float(slope_N[tops["fit"]].mean()) > 0 else 1
        assert row["informative"] is (row["sign"] == lowers)
        top = tops[row["examples"]]
        kl_N = kl_divergence(before_NC + row["sign"] * row["epsilon"] * along_NC, before_NC)
        assert row["kl_top"] == pytest.approx(float(kl_N[top].mean()), rel=1e-3)
        if not row["informative"]:
            most = float(-p_NC[range(len(p_NC)), predicted_N].log()[top].mean())
            assert row["target_kl"] == pytest.approx(min(0.05, most / 2), rel=1e-4)
            assert row["kl_ratio"] is None


def test_the_three_controls_are_compared_example_by_example(
    worker_of: Callable[..., VerificationWorker], lifted: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls (b) and (c) in float64 from the directions. Control (a) are the traces of the Fishers."""
    compared: list[tuple[Measured, Sequence[Measured], int]] = []

    def recorded_confidence(own: Measured, controls: Sequence[Measured], seed: int) -> Confidence:
        compared.append((own, controls, seed))
        return confidence(own, controls, seed)

    monkeypatch.setattr(rows, "confidence", recorded_confidence)
    worker, directions = worker_of(exact=True), DirectionStore.open(lifted.directions)
    model = npeff.tasks.load_task(lifted.config.task.name, {}).model(lifted.task_cache)
    pixels_NP = worker._loaded.examples.batch(range(len(worker._scores_NK))).double()
    before_NC = pixels_NP @ model.weight.detach().double().T + model.bias.detach().double()
    informative = {row["examples"]: row for row in of(worker.verify(1), True)}
    found = [each for each in compared if each[1]]  # without those of the random baseline, which have no controls
    assert len(found) == 4
    for split, (own, controls, seed) in zip(("fit", "held_out"), found[::2], strict=True):
        row, groups = informative[split], worker._candidates.groups(1, split, 24, 50, seed)
        traces, *moved = controls
        examples = [groups.top, groups.matched.examples_m]
        g = {name: torch.from_numpy(value) for name, value in directions.read(1).items()}
        steps = {
            "random": random_direction(g, seed=worker._seed(1, "random direction")),
            "other": {name: torch.from_numpy(v) for name, v in directions.read(row["other_component"]).items()},
        }
        for (name, direction), control in zip(steps.items(), moved, strict=True):
            along_NC = pixels_NP @ direction["weight"].double().T + direction["bias"].double()
            kl_N = kl_divergence(before_NC + row["sign"] * row[f"{name}_epsilon"] * along_NC, before_NC).numpy()
            for values, group in zip((control.top_n, control.baseline_m), examples, strict=True):
                np.testing.assert_allclose(values, kl_N[group], rtol=1e-2, atol=1e-5)
        for values, group in zip((traces.top_n, traces.baseline_m), examples, strict=True):
            np.testing.assert_array_equal(values, worker._candidates.traces_N[group])
        assert row["above_controls"] is confidence(own, controls, seed).above_controls


def test_a_sign_that_can_change_nothing_is_unreachable(worker_of: Callable[..., VerificationWorker]) -> None:
    """Predictions of an infinitely certain model cannot become more certain."""
    worker = worker_of()
    with torch.no_grad():
        for parameter in worker._loaded.model.parameters():
            parameter.mul_(1e4)
    worker._model._stored = None  # the stored logits are those of the model before
    rows = of(worker.verify(0), False)
    assert rows
    for row in rows:
        assert not row["reached_target"]
        assert row["kl_ratio_matched"] is None
        assert not row["above_controls"]


def test_groups_that_have_nothing_to_do_with_the_direction_are_rarely_surely_above_the_controls(
    worker_of: Callable[..., VerificationWorker], fast: list[Row]
) -> None:
    """The coefficients are permuted among the examples of a split, three times."""
    worker, rng, found = worker_of(), np.random.default_rng(0), list[Row]()
    coefficients_NK = worker._coefficients_NK.copy()
    for _ in range(3):
        for members_N in worker._candidates.members.values():
            rows = np.flatnonzero(members_N)
            worker._coefficients_NK[rows] = coefficients_NK[rng.permutation(rows)]
        found += [row for component in range(K) for row in of(worker.verify(component), True)]
    assert len(found) == 6 * K
    assert np.mean([row["above_controls"] for row in found]) <= 0.15
    assert np.mean([row["above_controls"] for row in of(fast, True)]) >= 0.5
    medians = [np.median([row["kl_ratio_matched"] for row in rows]) for rows in (found, of(fast, True))]
    assert medians[0] < 1.3 < 2 < medians[1]


def test_the_record_tells_the_cost_and_the_errors_and_a_failure_is_said(lifted: RunDirectory, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", lifted.config)
    shutil.copytree(lifted.path, run.path, dirs_exist_ok=True)
    record = npeff.verify(run)
    rows = read_table(run.table("verification"), "verification").to_pylist()
    assert record["examples_passed"] == sum(row["examples_passed"] for row in rows) > 0
    assert record["selectivity_error"] < 0.01
    assert record["other_kl_ratio_error"] < 0.01
    assert len(read_table(run.table("selectivity"), "selectivity")) == 2 * K * K
    lines = headline(record["scores"])
    assert lines[-2].startswith("held-out examples, informative sign: median matched KL ratio ")
    assert lines[-1].startswith("A matched KL ratio of ")
    failed = [score | {"failure": "the median is not above 1"} for score in record["scores"]]
    assert headline(failed)[-1] == "warning: the components fail the verification: the median is not above 1"


def test_the_evidence_can_choose_the_examples(lifted: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(lifted.path, tmp_path / "run")
    stored = RunDirectory.open(tmp_path / "run")
    npeff.verify(stored)
    before = read_table(stored.table("example_shifts"), "example_shifts")
    document = yaml.safe_load(stored.settings.read_text())
    assert document["verification"].pop("by") == "coefficient"  # a run of an earlier version has no such key
    stored.settings.write_text(yaml.safe_dump(document))
    earlier = RunDirectory.open(tmp_path / "run")
    assert recorded(earlier, VERIFY) is not None
    document["verification"]["by"] = "evidence"
    stored.settings.write_text(yaml.safe_dump(document))
    run = RunDirectory.open(tmp_path / "run")
    assert recorded(run, VERIFY) is None
    npeff.verify(run)
    table = read_table(run.table("example_shifts"), "example_shifts")
    assert table != before
    evidence = open_factorization(run.factorization).read_evidence()
    assert evidence is not None
    split = np.array(read_table(run.table("examples"), "examples")["split"].to_pylist())
    for row in table.to_pylist():
        among = np.nan_to_num(np.where(split == row["examples"], evidence[:, row["component"]], -np.inf), nan=-np.inf)
        assert row["example"] in np.argsort(-among)[: run.config.verification.top_examples]


def test_evidence_that_is_not_stored_is_refused(
    lifted: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(lifted.path, tmp_path / "run")
    run = RunDirectory.open(tmp_path / "run")
    document = yaml.safe_load(run.settings.read_text())
    document["verification"]["by"] = "evidence"
    run.settings.write_text(yaml.safe_dump(document))
    without = replace(open_factorization(run.factorization), evidence=None)  # as of an earlier version
    monkeypatch.setattr("npeff.stages.verify.stage.open_factorization", lambda path: without)
    with pytest.raises(NpeffError, match=r"verification\.by: evidence needs stored evidence"):
        npeff.verify(RunDirectory.open(run.path))


def test_a_run_whose_steps_change_nothing_says_that_it_fails(lifted: RunDirectory, tmp_path: Path) -> None:
    """With steps that are lost in rounding, no KL ratio is above 1. The stage, the outcome and the report say so."""
    unmoved = {"verification": lifted.config.verification.model_copy(update={"epsilon": 1e-14})}
    run = RunDirectory(tmp_path / "run", lifted.config.model_copy(update=unmoved))
    shutil.copytree(lifted.path, run.path, dirs_exist_ok=True)
    said = list[str]()

    class Progress(SilentProgress):
        def say(self, message: str) -> None:
            said.append(message)

    record = npeff.verify(run, progress=Progress())
    failure = record["scores"][0]["failure"]
    assert re.fullmatch(r"the median KL ratio on held-out examples, 0\.00, is not above .*", failure)
    warning = f"warning: the components fail the verification: {failure}"
    assert said[0] == warning
    assert headline(record["scores"])[-1] == warning
    page = write_report(run.path).read_text(encoding="utf-8")
    lede = page.partition('<p class="lede">')[2].partition("</p>")[0].strip()
    assert lede.startswith(f"<strong>The components of this run fail the verification: {escape(failure)}.</strong>")


def test_what_a_step_does_to_the_predictions_is_told(lifted: RunDirectory, tmp_path: Path) -> None:
    """Recomputed in float64 from the stored directions and steps."""
    run = RunDirectory(tmp_path / "run", lifted.config)
    shutil.copytree(lifted.path, run.path, dirs_exist_ok=True)
    npeff.verify(run)
    rows, per_class, per_example = (
        read_table(run.table(name), name).to_pylist()
        for name in ("verification", "prediction_shifts", "example_shifts")
    )
    task, directions = npeff.tasks.load_task(run.config.task.name, {}), DirectionStore.open(run.directions)
    model = task.model(run.task_cache)
    pixels_NP = task._pixels.double()  # type: ignore[attr-defined]
    weight, bias = (parameter.detach().double() for parameter in (model.weight, model.bias))
    before_NC = pixels_NP @ weight.T + bias
    for row in rows:
        key = {name: row[name] for name in ("component", "examples", "sign")}
        mine = [each for each in per_example if key.items() <= each.items()]
        classes = [each for each in per_class if key.items() <= each.items()]
        if not row["informative"] and not row["reached_target"]:
            assert not mine
            assert not classes
            assert row["flip_share"] is row["raised"] is None
            continue
        assert [each["rank"] for each in mine] == list(range(row["n_top"]))
        g = {name: torch.from_numpy(value).double() for name, value in directions.read(row["component"]).items()}
        step_NC = row["sign"] * row["epsilon"] * (pixels_NP @ g["weight"].T + g["bias"])
        top = [each["example"] for each in mine]
        p_nC, q_nC = ((before_NC + moved_NC)[top].softmax(-1) for moved_NC in (0 * step_NC, step_NC))
        old_n, new_n = p_nC.argmax(1), q_nC.argmax(1)
        assert [(each["class_before"], each["class_after"]) for each in mine] == list(
            zip(old_n.tolist(), new_n.tolist(), strict=True)
        )
        for name, expected_n in [
            ("p_before", p_nC[range(len(top)), old_n]),
            ("p_after", q_nC[range(len(top)), old_n]),
            ("p_new", q_nC[range(len(top)), new_n]),
            ("kl", kl_divergence(q_nC.log(), p_nC.log())),
        ]:
            assert [each[name] for each in mine] == pytest.approx(expected_n.tolist(), rel=1e-3, abs=1e-7)
        assert [each["p_after"] for each in classes] == pytest.approx(q_nC.mean(0).tolist(), rel=1e-3)
        assert row["raised"] == pytest.approx(float((q_nC.mean(0) - p_nC.mean(0)).max()), rel=1e-3)
        assert row["lowered_class"] == int((q_nC.mean(0) - p_nC.mean(0)).argmin())
        flips = [pair for pair in zip(old_n.tolist(), new_n.tolist(), strict=True) if pair[0] != pair[1]]
        assert row["changed_top"] == pytest.approx(len(flips) / len(top))
        if flips:
            most = max(flips.count(pair) for pair in flips)
            assert row["flip_share"] == pytest.approx(most / len(top))
            assert flips.count((row["flip_from"], row["flip_to"])) == most


@pytest.mark.parametrize("array", ["grams", "factors"])
def test_a_shard_with_other_values_is_refused(array: str, lifted: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(lifted.fishers, tmp_path / "fishers.zarr")
    store = FisherStore.open(tmp_path / "fishers.zarr")
    arrays = store.read_shard(0)
    store.write_shard(0, arrays | {array: 2 * arrays[array]})
    paths = VerificationPaths.of(lifted, tmp_path / "results", fishers=tmp_path / "fishers.zarr")
    options = VerificationOptions(4, 4, 0.05, None, 4, 10, seed=0, batch_size=64)
    with pytest.raises(StoreError, match="does not match its checksum"):
        VerificationWorker(model_spec(lifted, None), paths, options).verify(0)
