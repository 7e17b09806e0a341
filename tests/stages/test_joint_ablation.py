"""The table `joint_ablation`: by its definition, on a model that is linear in its parameters."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
from end_to_end import damage
from npeff.models.predictions import kl_divergence
from npeff.query.components import ComponentStore
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory
from npeff.stages.status import outcome
from npeff.stages.verify import VERIFY, joint_ablation_line
from npeff.stages.verify.joint_ablation import JointRemovals
from npeff.stages.verify.options import VerificationOptions, VerificationPaths
from npeff.stages.verify.stored_sketches import StoredSketches
from npeff.stages.verify.worker import VerificationWorker
from npeff.stages.worker_specs import model_spec
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import read_table
from safetensors.torch import save_file
from stages.linear_digits import K

VERIFIED, N_DRAWS = (0, 1), 4

Row = dict[str, Any]


@pytest.fixture(scope="module")
def worker_of(lifted: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., VerificationWorker]:
    def make(**changed: Any) -> VerificationWorker:
        paths = VerificationPaths.of(lifted, tmp_path_factory.mktemp("results"))
        options = VerificationOptions(24, 30, 0.05, None, 0, 0, seed=0, batch_size=64, joint_ablation=N_DRAWS)
        return VerificationWorker(model_spec(lifted, None), paths, replace(options, **changed))

    return make


def rows_of(worker: VerificationWorker, component: int) -> list[Row]:
    worker.verify(component)
    rows: list[Row] = read_table(worker._paths.file("joint_ablation", component), "joint_ablation").to_pylist()
    return rows


@pytest.fixture(scope="module")
def rows(worker_of: Callable[..., VerificationWorker]) -> list[Row]:
    worker = worker_of()
    return [row for component in VERIFIED for row in rows_of(worker, component)]


def assert_same(row: Row, expected: Row) -> None:
    assert row["removed"] == expected["removed"]
    assert row["examples"] == expected["examples"]
    for name in row.keys() - {"removed", "examples"}:
        same = expected[name] if expected[name] is None else pytest.approx(expected[name], rel=1e-3, abs=1e-7)
        assert row[name] == same, name


class Definition:
    """The linear model in float64, with its examples and stored directions."""

    def __init__(self, run: RunDirectory) -> None:
        task = npeff.tasks.load_task(run.config.task.name, {})
        model, store = task.model(run.task_cache), DirectionStore.open(run.directions)
        self.pixels_NF = task._pixels.double()  # type: ignore[attr-defined]
        self.theta_P = torch.cat([model.weight.detach().double().flatten(), model.bias.detach().double()])
        read = [store.read(component) for component in range(K)]
        self.directions_KP = torch.from_numpy(
            np.stack([np.concatenate([each["weight"].ravel(), each["bias"]]) for each in read])
        ).double()

    def logits(self, theta_P: torch.Tensor) -> torch.Tensor:
        return self.pixels_NF @ theta_P[:640].view(10, 64).T + theta_P[640:]

    def without(self, removed: list[int], origin_P: torch.Tensor | float = 0.0) -> torch.Tensor:
        """θ_S, by a projection on an orthonormal basis of the span."""
        basis_PS = torch.linalg.qr(self.directions_KP[removed].T)[0]
        return self.theta_P - basis_PS @ (basis_PS.T @ (self.theta_P - origin_P))


def ratio(kl_N: torch.Tensor, worker: VerificationWorker, component: int, split: str) -> float:
    seed = worker._seed(component, f"baseline {split}")
    groups = worker._candidates.groups(component, split, 24, 30, seed)
    counts_m = torch.from_numpy(groups.matched.counts_m).double()
    matched = float(kl_N[groups.matched.examples_m] @ counts_m / counts_m.sum())
    return float(kl_N[groups.top].mean()) / matched


@pytest.mark.parametrize("with_origin", [False, True])
def test_every_row_is_that_of_its_definition(
    with_origin: bool,
    lifted: RunDirectory,
    rows: list[Row],
    worker_of: Callable[..., VerificationWorker],
    tmp_path: Path,
) -> None:
    by_hand, worker, origin_P = Definition(lifted), worker_of(), torch.zeros(650).double()
    if with_origin:
        drawn = {"weight": 0.1 * torch.randn(10, 64), "bias": 0.1 * torch.randn(10)}
        save_file(drawn, tmp_path / "origin.safetensors")
        origin_P = torch.cat([drawn["weight"].flatten(), drawn["bias"]]).double()
        worker = worker_of(origin=tmp_path / "origin.safetensors")
        rows = rows_of(worker, 1)
    assert [row["draw"] for row in rows if row["component"] == 1] == [*range(N_DRAWS), None]
    assert {row["examples"] for row in rows} == {"held_out"}
    tested = [row for component in {row["component"] for row in rows} for row in worker.verify(component)]
    steps = {
        row["component"]: (row["sign"] * row["epsilon"], row["kl_ratio_matched"])
        for row in tested
        if row["informative"] and row["examples"] == "held_out"
    }
    before_NC = by_hand.logits(by_hand.theta_P)
    for row in rows:
        component, removed = row["component"], row["removed"]
        step, unablated = steps[component]
        assert component not in removed
        assert row["n_removed"] == len(removed)
        assert row["adversarial"] is (row["draw"] is None)
        theta_P = by_hand.without(removed, origin_P)
        assert row["displacement"] == pytest.approx(float((theta_P - by_hand.theta_P).norm()), rel=1e-5, abs=1e-9)
        own_P = by_hand.directions_KP[component]
        inside_P = own_P - (by_hand.without(removed, by_hand.theta_P - own_P) - by_hand.theta_P + own_P)
        assert row["overlap"] == pytest.approx(float(inside_P.norm()), abs=1e-5)
        after_NC, stepped_NC = by_hand.logits(theta_P), by_hand.logits(theta_P + step * own_P)
        removal_N, step_N = kl_divergence(after_NC, before_NC), kl_divergence(stepped_NC, after_NC)
        found = worker._candidates.groups(component, "held_out", 24, 30, worker._seed(component, "baseline held_out"))
        assert row["kl_removed_top"] == pytest.approx(float(removal_N[found.top].mean()), rel=1e-3, abs=1e-9)
        assert row["kl_top"] == pytest.approx(float(step_N[found.top].mean()), rel=1e-3)
        assert row["kl_ratio_matched"] == pytest.approx(ratio(step_N, worker, component, "held_out"), rel=1e-3)
        assert row["kl_ratio_unablated"] == unablated
        expected = row["kl_ratio_matched"] >= 0.5 * unablated and row["kl_ratio_matched"] > 1
        assert row["still_there"] is expected
        assert row["kl_ratio_predicted"] == pytest.approx(ratio(step_N, worker, component, "fit"), rel=1e-2)


def test_the_adversarial_subset_is_predicted_to_be_no_better_than_any_draw(rows: list[Row]) -> None:
    for component in VERIFIED:
        own = [row for row in rows if row["component"] == component]
        (adversarial,) = [row for row in own if row["adversarial"]]
        assert all(adversarial["kl_ratio_predicted"] <= row["kl_ratio_predicted"] for row in own)


def test_a_single_other_direction_is_removed_as_the_ablation_removes_it(
    worker_of: Callable[..., VerificationWorker],
) -> None:
    worker = worker_of(lifted=[0, 3], ablation=True)
    found = [row for component in (0, 3) for row in rows_of(worker, component)]
    ablated = {
        component: read_table(worker._paths.file("ablation", component), "ablation")["displacement"][0].as_py()
        for component in (0, 3)
    }
    assert {row["n_removed"] for row in found} == {0, 1}
    for row in found:
        assert set(row["removed"]) <= {3 - row["component"]}
        along = ablated[3 - row["component"]] if row["removed"] else 0.0
        assert row["displacement"] == pytest.approx(abs(along), rel=1e-5)
        if not row["removed"]:
            assert row["kl_ratio_matched"] == pytest.approx(row["kl_ratio_unablated"], rel=1e-3)
            assert (row["overlap"], row["still_there"]) == (0, True)
    assert rows_of(worker_of(lifted=[2]), 2) == []


def test_rows_depend_neither_on_the_batch_nor_on_the_order_nor_on_the_memory(
    rows: list[Row], worker_of: Callable[..., VerificationWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npeff.stages.verify.joint_ablation._BLOCK_BYTES", 4 * 650 * 2)
    worker = worker_of(batch_size=7, joint_ablation=N_DRAWS + 1)
    for component in (1, 0):
        found = [row for row in rows_of(worker, component) if row["draw"] != N_DRAWS]
        expected = [row for row in rows if row["component"] == component]
        for mine, theirs in zip(found[:N_DRAWS], expected[:N_DRAWS], strict=True):
            assert_same(mine, theirs)
        assert found[-1]["kl_ratio_predicted"] <= expected[-1]["kl_ratio_predicted"] * (1 + 1e-6)


def test_without_the_option_there_is_no_table_and_no_pass(worker_of: Callable[..., VerificationWorker]) -> None:
    without, with_option = worker_of(joint_ablation=0), worker_of()
    assert without.verify(1) == with_option.verify(1), "the passes of the table verification are those without it"
    assert not without._paths.file("joint_ablation", 1).parent.exists()
    passed = sum(
        read_table(with_option._paths.file("joint_ablation", 1), "joint_ablation")["examples_passed"].to_pylist()
    )
    assert without._model.n_passed == with_option._model.n_passed - passed


def test_where_logits_are_not_predicted_there_are_random_draws_only(
    rows: list[Row], worker_of: Callable[..., VerificationWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoredSketches, "_label_factors", lambda *_: None)
    found = rows_of(worker_of(), 1)
    assert [row["draw"] for row in found] == list(range(N_DRAWS))
    assert [row["removed"] for row in found] == [row["removed"] for row in rows if row["component"] == 1][:N_DRAWS]
    assert all(row["kl_ratio_predicted"] is None and row["kl_ratio_matched"] is not None for row in found)


def test_of_a_step_that_does_not_reach_its_target_there_is_only_the_removal(
    rows: list[Row], worker_of: Callable[..., VerificationWorker]
) -> None:
    found = [row for row in rows_of(worker_of(target_kl=1e4), 1) if not row["adversarial"]]
    for row, measured in zip(found, [row for row in rows if row["component"] == 1], strict=False):
        assert row["kl_removed_top"] == pytest.approx(measured["kl_removed_top"], rel=1e-6)
        assert row["examples_passed"] * 2 == measured["examples_passed"]
        unknown = ("kl_top", "kl_matched", "kl_ratio_matched", "kl_ratio_unablated", "still_there")
        assert [row[name] for name in unknown] == [None] * 5


def test_in_half_precision_a_removal_of_nothing_changes_nothing(
    worker_of: Callable[..., VerificationWorker], tmp_path: Path
) -> None:
    worker = worker_of()
    worker._loaded.model.bfloat16()
    theta = {name: tensor.detach().clone() for name, tensor in worker._loaded.model.named_parameters()}
    save_file(theta, tmp_path / "origin.safetensors")
    worker = worker_of(origin=tmp_path / "origin.safetensors")
    worker._loaded.model.bfloat16()
    worker._model._stored = None  # as for a model that is loaded in half precision
    for row in rows_of(worker, 2):
        assert (row["displacement"], row["kl_removed_top"], row["kl_removed_matched"]) == (0, 0, 0)
        assert row["kl_ratio_matched"] == row["kl_ratio_unablated"]
        assert row["still_there"]


def test_logits_that_are_not_finite_after_a_removal_have_no_effect(
    worker_of: Callable[..., VerificationWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = JointRemovals._removed_parts

    def broken(*arguments: Any) -> Any:
        for removal, removed in remove(*arguments):
            yield removal, {name: tensor * float("inf") for name, tensor in removed.items()}

    monkeypatch.setattr(JointRemovals, "_removed_parts", broken)
    for row in rows_of(worker_of(), 2):
        if row["n_removed"]:
            assert [row[name] for name in ("kl_removed_top", "kl_top", "kl_ratio_matched", "still_there")] == [None] * 4


def test_results_of_earlier_versions_fit_the_settings_without_the_option(lifted: RunDirectory) -> None:
    section = lifted.config.verification
    with_option = lifted.config.model_copy(
        update={"verification": section.model_copy(update={"joint_ablation": N_DRAWS})}
    )
    assert "joint_ablation" not in VERIFY.settings(lifted.config)
    assert VERIFY.settings(with_option) == VERIFY.settings(lifted.config) | {"joint_ablation": N_DRAWS}


class Interrupted(Exception):
    pass


def test_the_stage_goes_on_after_an_interruption_and_mends_what_is_damaged(
    lifted: RunDirectory, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"top_examples": 24, "baseline_examples": 30, "target_kl": 0.05, "joint_ablation": N_DRAWS}
    small = {"selectivity_examples": 0, "correlation_examples": 0}
    document = lifted.config.model_dump() | {"run_dir": str(tmp_path / "run"), "verification": wanted | small}
    shutil.copytree(lifted.path, tmp_path / "run")
    run = RunDirectory(tmp_path / "run", RunConfig.model_validate(document))
    verify, calls = VerificationWorker.verify, []

    def interrupted(worker: VerificationWorker, component: int) -> Any:
        calls.append(component)
        if len(calls) == 2:
            raise Interrupted
        return verify(worker, component)

    monkeypatch.setattr(VerificationWorker, "verify", interrupted)
    with pytest.raises(Interrupted):
        npeff.verify(run)
    record = npeff.verify(run)
    assert calls == [0, 1, *range(1, K)]
    found = read_table(run.table("joint_ablation"), "joint_ablation").to_pylist()
    for mine, theirs in zip([row for row in found if row["component"] in VERIFIED], rows, strict=True):
        assert_same(mine, theirs)
    joint = record["joint_ablation"]
    assert (joint["examples"], joint["n_draws"], joint["n"] + joint["n_left_out"]) == ("held_out", N_DRAWS, K)
    assert joint_ablation_line(joint) in outcome(run, "npeff")
    assert len(ComponentStore.open(run.path).sql("select * from joint_ablation where adversarial")) == K

    damage.flip(run.table("joint_ablation"))
    damage.flip(run.partial_results("verify") / "joint_ablation" / "00001.parquet")
    assert {each.what for each in npeff.check(run)} == {"table joint_ablation", "verification of component 1"}
    assert npeff.check(run, recompute=True) == []
    assert read_table(run.table("joint_ablation"), "joint_ablation").to_pylist() == found
