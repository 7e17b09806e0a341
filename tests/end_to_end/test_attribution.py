"""Attribution, ablation and partial lifts through the stages, on a model whose program is known.

Shapes: K components, T positions, P parameters.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pytest
import torch
from end_to_end import damage
from end_to_end.run_contents import DIRECTIONS_TOLERANCE
from npeff.cli import main as cli
from npeff.execution.executor import ExecutorError
from npeff.execution.ray.metrics import RunMetrics
from npeff.gradients import GradientCollector, position_shares
from npeff.models.loaded import LoadedModel
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.progress import SilentProgress
from npeff.stages.attribute.worker import AttributionWorker
from npeff.stages.earlier_results import fingerprint_of, lifted_components
from npeff.stages.factorize.solution import write_solution
from npeff.stages.lift.worker import LiftBlock, LiftWorker
from npeff.stages.pipeline import export_direction
from npeff.stages.worker_specs import model_spec
from npeff.store.component_store import open_factorization
from npeff.store.direction_store import DirectionStore
from npeff.store.tables import read_table
from npeff.tasks import TaskError
from safetensors.torch import save_file

FIRST, ALL = [1, 3], [0, 1, 2, 3]


def config(path: Path, **sections: dict[str, Any]) -> RunConfig:
    document: dict[str, dict[str, Any]] = {
        "fishers": {"sketch": {"kind": "tensorsketch", "dim": 512}},
        "factorization": {"n_components": 4, "n_starts": 1, "max_iterations": 20, "stability_examples": 0},
        "lift": {"dtype": "float16", "components": FIRST},
        "verification": {
            "top_examples": 6,
            "baseline_examples": 10,
            "selectivity_examples": 2,
            "correlation_examples": 10,
            "orthogonalize": "semi",
            "ablation": True,
            "joint_ablation": 3,
        },
        "report": {"top_examples": 2},
    }
    for name, values in sections.items():
        document[name] = document.get(name, {}) | values
    task = {"name": "compiled-rules", "options": {"n_examples": 90}}
    run = {"run_dir": str(path), "task": task, "executor": {"kind": "serial"}}
    return RunConfig.model_validate(run | document)


def table(run: RunDirectory, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = read_table(run.table(name), name).to_pylist()
    return rows


def again(run: RunDirectory, **sections: dict[str, Any]) -> RunDirectory:
    return RunDirectory.create(config(run.path, **sections))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Two of four components lifted, verified and attributed."""
    run = RunDirectory.create(config(tmp_path_factory.mktemp("attribution") / "run"))
    for stage in (npeff.compute_fishers, npeff.factorize, npeff.lift, npeff.verify, npeff.attribute):
        stage(run)
    return run


@pytest.fixture(scope="module")
def loaded(run: RunDirectory) -> LoadedModel:
    return model_spec(run, fingerprint_of(run)).load()


def copied(run: RunDirectory, path: Path) -> RunDirectory:
    return RunDirectory.open(shutil.copytree(run.path, path))


def direction(run: RunDirectory, component: int) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(values) for name, values in DirectionStore.open(run.directions).read(component).items()
    }


def test_only_the_chosen_components_are_lifted_verified_and_attributed(run: RunDirectory) -> None:
    assert {row["component"] for row in table(run, "verification")} == set(FIRST)
    assert {row["other_component"] for row in table(run, "verification")} == set(FIRST)
    assert {row["component"] for row in table(run, "position_shares")} == set(FIRST)
    assert {row["component"] for row in table(run, "layer_energy")} == set(FIRST)
    with pytest.raises(QueryError, match=r"component 2 is not lifted: run `npeff lift .* -c 2` first"):
        ComponentStore.open(run.path).layer_energy(2)
    cosines = [row["lift_cosine"] for row in table(run, "components")]
    assert [cosine is not None for cosine in cosines] == [False, True, False, True]
    assert all(array.dtype == np.float16 for array in DirectionStore.open(run.directions).arrays.values())
    assert min(cosine for cosine in cosines if cosine is not None) > 0.95
    for component in FIRST:
        length = sum(float(tensor.square().sum()) for tensor in direction(run, component).values())
        assert length == pytest.approx(1, abs=1e-3)


def test_of_a_block_that_is_given_to_another_worker_what_is_written_stays(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(run, tmp_path / "run")
    shutil.rmtree(copy.directions)
    lift, write, written = LiftWorker.lift, LiftWorker._write, []

    def lost_at_the_second(worker: LiftWorker, component: int, *found: Any) -> Any:
        written.append(component)
        if len(written) == 2:
            raise ConnectionError("the machine is gone")
        return write(worker, component, *found)

    def given_twice(worker: LiftWorker, block: LiftBlock) -> Any:
        assert block.components == tuple(FIRST)
        with pytest.raises(ConnectionError):
            lift(worker, block)
        return lift(worker, block)

    monkeypatch.setattr(LiftWorker, "_write", lost_at_the_second)
    monkeypatch.setattr(LiftWorker, "lift", given_twice)
    npeff.lift(copy)
    assert written == [1, 3, 3]
    energies = [[row["energy"] for row in table(each, "layer_energy")] for each in (copy, run)]
    np.testing.assert_allclose(*energies, atol=1e-6)
    for component in FIRST:
        for name, tensor in direction(run, component).items():
            torch.testing.assert_close(direction(copy, component)[name], tensor, rtol=1e-3, atol=1e-5)


def test_shares_are_those_of_the_reports_top_examples_with_their_words(run: RunDirectory, loaded: LoadedModel) -> None:
    rows = table(run, "position_shares")
    shown = {(row["component"], row["example"]) for row in table(run, "top_examples") if row["rank"] < 2}
    shown = {(component, example) for component, example in shown if component in FIRST}
    assert {(row["component"], row["example"]) for row in rows} == shown
    texts = read_table(run.table("examples"), "examples")["text"].to_pylist()
    assert all(texts[row["example"]][row["start"] : row["stop"]] == row["token"] for row in rows)

    collector = GradientCollector(
        loaded.model, loaded.logits, loaded.layout, run.config.fishers.label_spec(run.config.seed)
    )
    for component in FIRST:
        examples = sorted(example for of, example in shown if of == component)
        own = {name: tensor[None] for name, tensor in direction(run, component).items()}
        # all in one batch, where the worker takes one example at a time
        found = position_shares(collector, loaded.batch(examples), own, (16,), examples)
        expected_BT = (found.shares_kBT / found.evidence_kB[..., None])[0]
        for example, expected_T in zip(examples, expected_BT.tolist(), strict=True):
            stored = [row for row in rows if (row["component"], row["example"]) == (component, example)]
            assert [row["position"] for row in stored] == list(range(16))
            np.testing.assert_allclose([row["share"] for row in stored], expected_T, atol=1e-5)


def test_the_ablation_takes_the_parameters_own_part_out(run: RunDirectory, loaded: LoadedModel) -> None:
    """By its definition, with directions made orthogonal by least squares in numpy."""
    stored = open_factorization(run.factorization)
    coefficients_NK, components_KD = stored.read_coefficients(), stored.read_components()
    examples = read_table(run.table("examples"), "examples")
    fit_N = np.array(examples["split"].to_pylist()) == "fit"
    masses_K = coefficients_NK[fit_N].sum(0)
    assert abs(components_KD[1] @ components_KD[3]) >= 0.05, "there is something to make orthogonal"
    names = loaded.layout.names
    flat = {k: torch.cat([direction(run, k)[name].flatten() for name in names]).double() for k in FIRST}
    heavy, light = sorted(FIRST, key=lambda component: -masses_K[component])
    left_P = flat[light] - flat[heavy] * (flat[heavy] @ flat[light]) / (flat[heavy] @ flat[heavy])
    tested = {heavy: flat[heavy], light: left_P / left_P.norm()}
    parameters = dict(loaded.model.named_parameters())
    theta_P = torch.cat([parameters[name].detach().flatten() for name in names]).double()
    rows = table(run, "ablation")
    assert [(row["component"], row["examples"]) for row in rows] == [(k, s) for k in FIRST for s in ("fit", "held_out")]
    for row in rows:
        g_P = tested[row["component"]]
        assert row["displacement"] == pytest.approx(float(g_P @ theta_P), rel=1e-4)
        split_N = fit_N if row["examples"] == "fit" else ~fit_N
        w_N = np.where(split_N, coefficients_NK[:, row["component"]], 0)
        top = np.argsort(-w_N, kind="stable")[: min(6, int((w_N > 0).sum()))].tolist()
        batch = loaded.batch(top)
        with torch.no_grad():
            before = loaded.logits(loaded.model, batch).double().log_softmax(-1)
            kept = {name: parameters[name].clone() for name in names}
            ablated = (theta_P - g_P * (g_P @ theta_P)).split([parameters[name].numel() for name in names])
            for name, part in zip(names, ablated, strict=True):
                parameters[name].copy_(part.reshape(parameters[name].shape))
            after = loaded.logits(loaded.model, batch).double().log_softmax(-1)
            for name in names:
                parameters[name].copy_(kept[name])
        assert row["kl_top"] == pytest.approx(float((after.exp() * (after - before)).sum(-1).mean()), rel=1e-2)
        assert row["kl_ratio"] == pytest.approx(row["kl_top"] / row["kl_baseline"])


def test_a_joint_ablation_removes_stored_directions_in_half_precision(run: RunDirectory, loaded: LoadedModel) -> None:
    """With two components, a subset is empty or the other component: its stored direction, which is not projected."""
    rows = table(run, "joint_ablation")
    assert [(row["component"], row["draw"]) for row in rows] == [(k, draw) for k in FIRST for draw in (0, 1, 2, None)]
    assert {len(row["removed"]) for row in rows} == {0, 1}
    theta = dict(loaded.model.named_parameters())
    for row in rows:
        (other,) = set(FIRST) - {row["component"]}
        read = direction(run, other)
        squares = sum(float(tensor.double().square().sum()) for tensor in read.values())
        along = sum(float((tensor.double() * theta[name].detach().double()).sum()) for name, tensor in read.items())
        assert row["removed"] in ([], [other])
        assert row["displacement"] == pytest.approx(abs(along) / squares**0.5 if row["removed"] else 0, rel=1e-4)


def test_an_origin_at_the_model_itself_leaves_nothing_to_take_out(
    run: RunDirectory, loaded: LoadedModel, tmp_path: Path
) -> None:
    def verified(parameters: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        save_file(parameters, tmp_path / "origin.safetensors")
        other = RunDirectory(
            run.path, config(run.path, verification={"ablation_origin": str(tmp_path / "origin.safetensors")})
        )
        other.reopen("verify")
        for file in other.partial_results("verify").glob("*.parquet"):
            file.rename(tmp_path / file.name)
        try:
            npeff.verify(other)
            return table(other, "ablation")
        finally:
            for file in tmp_path.glob("0*.parquet"):
                file.rename(other.partial_results("verify") / file.name)

    before = table(run, "ablation")
    theta = {name: tensor.detach().clone() for name, tensor in loaded.model.named_parameters()}
    rows = verified(theta)
    assert [row["displacement"] for row in rows] == [0.0] * 4
    assert [row["kl_top"] for row in rows] == [0.0] * 4
    with pytest.raises(TaskError, match=r"ablation_origin: .* has no parameter"):
        verified({"elsewhere": torch.zeros(2)})
    run.reopen("verify")
    for component in FIRST:
        (run.partial_results("verify") / f"{component:05d}.parquet").unlink()
    npeff.verify(run)
    assert table(run, "ablation") == before


def test_a_task_without_tokens_has_an_empty_table(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npeff.tasks.planted.compiled._Sequences.tokens", lambda *_: None)
    run = copied(run, tmp_path / "run")
    other = again(run, report={"top_examples": 1})
    assert npeff.attribute(other)["n_rows"] == 0
    assert not table(other, "position_shares")
    monkeypatch.setattr("npeff.tasks.planted.compiled._Sequences.tokens", lambda *_: [[]])
    with pytest.raises(
        ExecutorError, match=r"tokens\(\) must return a list of one or more tokens for each of the \d+ requested"
    ):
        npeff.attribute(run)
    monkeypatch.undo()
    npeff.attribute(run)


class Interrupted(Exception):
    pass


def test_new_components_take_away_what_was_said_of_the_former_ones(run: RunDirectory, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "run")
    stored = open_factorization(other.factorization)
    components_KD, coefficients_NK = stored.read_components()[::-1], stored.read_coefficients()[:, ::-1]
    write_solution(other, components_KD, coefficients_NK, [], {})
    assert {path.stem for path in other.path.rglob("tables/*.parquet")} == {
        *("examples", "classes", "parameters", "components", "top_examples", "coefficients", "history")
    }


@pytest.mark.parametrize("in_run_file", [FIRST, None])
def test_a_repair_lifts_again_what_was_lifted_and_no_others(
    in_run_file: list[int] | None, run: RunDirectory, tmp_path: Path
) -> None:
    other = copied(run, tmp_path / "run")
    npeff.lift(RunDirectory(other.path, other.config.with_lift(components=(0,))))
    before = direction(other, 0)
    damage.flip(other.table("ablation"))
    damage.flip(max(path for path in other.directions.glob("*/c/0/0") if path.is_file()))
    other = RunDirectory(other.path, other.config.with_lift(components=in_run_file))
    assert {each.what for each in npeff.check(other)} == {"table ablation", "direction 0"}
    assert npeff.check(other, recompute=True) == []
    assert lifted_components(other) == [0, *FIRST]
    torch.testing.assert_close(direction(other, 0), before, rtol=0, atol=DIRECTIONS_TOLERANCE)
    assert [row for row in table(other, "ablation") if row["component"] in FIRST] == table(run, "ablation")


def test_others_are_added_and_what_is_there_stays(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifted in a second command; attribution is interrupted half-way through it, and goes on."""
    before = {name: table(run, name) for name in ("verification", "position_shares", "ablation")}
    stored = {component: direction(run, component) for component in FIRST}
    told: list[str] = []
    monkeypatch.setattr(RunMetrics, "__call__", lambda self, stage, *_: told.append(stage))
    with pytest.raises(SystemExit) as ended:
        cli.main(["lift", str(run.path), "-c", "0", "-c", "1"])
    assert not ended.value.code
    assert set(told) == {"lift"}
    run = RunDirectory.open(run.path)
    with pytest.raises(RunDirectoryError, match=r"component 2 is not lifted: run `npeff lift .* -c 2` first"):
        export_direction(run, 2, run.path / "direction.safetensors")
    everything = RunDirectory(run.path, run.config.with_lift(components=None))
    npeff.lift(everything)
    npeff.verify(run)

    attribute, calls = AttributionWorker.attribute, []

    def interrupted(self: AttributionWorker, component: int) -> int:
        calls.append(component)
        if len(calls) == 2:
            raise Interrupted
        return attribute(self, component)

    monkeypatch.setattr(AttributionWorker, "attribute", interrupted)
    with pytest.raises(Interrupted):
        npeff.attribute(run, progress=SilentProgress())
    assert npeff.attribute(run)["components"] == ALL
    assert calls == [0, 2, 2]
    for component in FIRST:
        assert all(torch.equal(tensor, stored[component][name]) for name, tensor in direction(run, component).items())
    for name, rows in before.items():
        found = table(run, name)
        assert {row["component"] for row in found} == set(ALL)
        assert [row for row in found if row["component"] in FIRST] == rows
    assert {row["component"] for row in table(run, "joint_ablation")} == set(ALL)
    assert all(row["lift_cosine"] > 0.9 for row in table(run, "components"))


def test_a_component_that_is_not_there_is_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"has no component 4: choose lift\.components from 0 to 3"):
        npeff.lift(RunDirectory(run.path, run.config.with_lift(components=(1, 4))))
    with pytest.raises(RunDirectoryError, match=r"it differs in lift\.dtype"):
        again(run, lift={"dtype": "float32"})
    for section, message in (
        ("lift: {components: []}", "give at least one component to lift"),
        ("verification: {ablation_origin: a.safetensors}", "ablation_origin needs ablation: true or joint_ablation"),
    ):
        file = tmp_path / "run.yaml"
        file.write_text(f"run_dir: x\ntask: {{name: digits}}\nfactorization: {{n_components: 4}}\n{section}\n")
        with pytest.raises(ConfigError, match=message):
            RunConfig.from_yaml(file)
