"""Going on with a finished factorization, and using one run's components in another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import npeff
import numpy as np
import pyarrow as pa
import pytest
import torch
from npeff.cli.main import main
from npeff.errors import NpeffError
from npeff.factorization import InvalidProblemError, nnls
from npeff.options.bounds import OptionError
from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.runs.errors import RunDirectoryError
from npeff.runs.stage import recorded
from npeff.stages.factorize import FACTORIZE
from npeff.stages.factorize.live_history import metrics_writer
from npeff.stages.factorize.worker import SolverWorker
from npeff.store.component_store import open_factorization
from npeff.store.fisher_store import FisherStore
from npeff.store.tables import read_table, write_table


def config(run_dir: Path, limit: int = 60, seed: int = 0, **factorization: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run_dir": str(run_dir),
            "seed": seed,
            "task": {"name": "digits", "options": {"limit": limit, "epochs": 1}},
            "fishers": {"sketch": {"dim": 64}, "shard_size": 16},
            "factorization": {"n_components": 3, "max_iterations": 4, "tolerance": 1e-12} | factorization,
            "executor": {"kind": "serial"},
        }
    )


@pytest.fixture(scope="module")
def factorized(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    run = RunDirectory.create(config(tmp_path_factory.mktemp("extend") / "run"))
    npeff.compute_fishers(run)
    npeff.factorize(run)
    return run


_OWN = shutil.ignore_patterns("run.yaml", "factorization.yaml", "checkpoints")


def beside(run: RunDirectory, run_dir: Path, **factorization: Any) -> RunDirectory:
    """Another run with the Fishers of `run`."""
    other = RunDirectory.create(config(run_dir, **factorization))
    shutil.copytree(
        run.path,
        run_dir,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("run.yaml", "factorization.yaml", "checkpoints"),
    )
    for stage in ("factorize",):
        other.reopen(stage)
    shutil.rmtree(other.factorization)
    return other


def arrays(run: RunDirectory) -> tuple[np.ndarray, np.ndarray]:
    stored = open_factorization(run.factorization)
    return stored.read_components(), stored.read_coefficients()


def test_a_raised_limit_continues_a_finished_run_bit_for_bit(factorized: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(factorized.path, tmp_path / "short")
    with pytest.raises(SystemExit) as end:
        main(["factorize", str(tmp_path / "short"), "--max-iterations", "9"])
    assert end.value.code in (0, None)
    continued = RunDirectory.open(tmp_path / "short")
    assert continued.config.factorization.max_iterations == 9
    whole = beside(factorized, tmp_path / "whole", max_iterations=9)
    npeff.factorize(whole)
    for one, other in zip(arrays(continued), arrays(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    columns = ["iteration", "loss", "mu", "accepted"]
    histories = [read_table(run.table("history"), "history").select(columns) for run in (continued, whole)]
    assert histories[0].equals(histories[1])
    assert len(histories[0]) == 9
    again = npeff.factorize(continued)
    assert again["n_iter"] == 9
    with pytest.raises(RunDirectoryError, match=r"has made 9 steps, more than factorization\.max_iterations: 5"):
        RunDirectory.create(continued.config.with_max_iterations(5))


def test_a_run_that_crashed_repeats_the_same_bits(
    factorized: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = beside(factorized, tmp_path / "broken", max_iterations=8, checkpoint_every=3, metrics="jsonl")
    step, calls = SolverWorker.step, []

    def dying_step(worker: SolverWorker) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(worker)

    monkeypatch.setattr(SolverWorker, "step", dying_step)
    with pytest.raises(KeyboardInterrupt):
        npeff.factorize(broken)
    npeff.factorize(broken)
    whole = beside(factorized, tmp_path / "whole", max_iterations=8)
    npeff.factorize(whole)
    for one, other in zip(arrays(broken), arrays(whole), strict=True):
        np.testing.assert_array_equal(one, other)
    lines = (broken.metrics / "factorize.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 9))


def test_a_run_starts_from_the_components_of_another(factorized: RunDirectory, tmp_path: Path) -> None:
    before = recorded(factorized, FACTORIZE)
    warm = beside(factorized, tmp_path / "warm", start_from=str(factorized.path), max_iterations=2)
    summary = npeff.factorize(warm)
    assert before is not None
    assert summary["loss"] <= before["loss"] * (1 + 1e-6)
    wrong = beside(factorized, tmp_path / "wrong", start_from=str(factorized.path), n_components=4)
    with pytest.raises(InvalidProblemError, match="has 3 components"):
        npeff.factorize(wrong)


def test_an_expanded_run_keeps_the_components_and_adds_others(factorized: RunDirectory, tmp_path: Path) -> None:
    more = beside(factorized, tmp_path / "more", expand=str(factorized.path), n_components=5)
    summary = npeff.factorize(more)
    np.testing.assert_allclose(arrays(more)[0][:3], arrays(factorized)[0], rtol=0, atol=1e-14)
    assert len(arrays(more)[0]) == summary["n_components"] == 5
    assert summary["explained"] > recorded(factorized, FACTORIZE)["explained"]  # type: ignore[index]
    with pytest.raises(OptionError, match="leave none to fit"):
        npeff.factorize(beside(factorized, tmp_path / "none", expand=str(factorized.path)))


def test_only_mispredicted_examples_are_fitted_and_all_get_coefficients(
    factorized: RunDirectory, tmp_path: Path
) -> None:
    run = beside(factorized, tmp_path / "wrong", examples="mispredicted")
    summary = npeff.factorize(run)
    examples = read_table(run.table("examples"), "examples").to_pandas()
    chosen = (~examples["correct"].astype(bool) & (examples["split"] == "fit")).to_numpy()
    assert 0 < summary["n_fit"] == chosen.sum() < (examples["split"] == "fit").sum()
    components_KD, coefficients_NK = arrays(run)
    factors_NRD = FisherStore.open(run.fishers).read_rows(np.arange(len(examples)), ["factors"])["factors"]
    h_KD, a_NRD = torch.from_numpy(components_KD), torch.from_numpy(factors_NRD).double()
    expected = nnls((a_NRD @ h_KD.T).square().sum(dim=1), (h_KD @ h_KD.T).square())
    np.testing.assert_allclose(coefficients_NK, expected, atol=1e-5)
    fishers = a_NRD.mT @ a_NRD
    residuals = fishers - torch.einsum("nk,kd,ke->nde", expected, h_KD, h_KD)
    assert summary["loss"] == pytest.approx(float(residuals[chosen].square().sum()), rel=1e-4)


def with_column(run: RunDirectory, name: str, values: Any) -> RunDirectory:
    examples = read_table(run.table("examples"), "examples")
    write_table(run.table("examples"), "examples", examples.append_column(name, pa.array(values)))
    return run


def test_examples_are_weighed_by_a_column_of_their_table(factorized: RunDirectory, tmp_path: Path) -> None:
    weights_N = np.random.default_rng(0).choice([0.0, 0.5, 1.0, 20.0], 60)
    plain = with_column(beside(factorized, tmp_path / "plain", max_iterations=60), "weight", weights_N)
    npeff.factorize(plain)
    run = with_column(
        beside(factorized, tmp_path / "run", max_iterations=60, example_weights="weight"), "weight", weights_N
    )
    summary = npeff.factorize(run)
    fit_N = np.array(read_table(run.table("examples"), "examples")["split"].to_pylist()) == "fit"
    factors_NRD = FisherStore.open(run.fishers).read_rows(np.arange(60), ["factors"])["factors"]

    def weighted_loss(run: RunDirectory) -> float:
        """Σ v_i ‖F̂_i − Σ_j W_ij h_j h_jᵀ‖² by the definition, over the examples fitted on."""
        h_KD, w_NK = arrays(run)
        a_NRD = factors_NRD.astype(np.float64)
        fishers = a_NRD.transpose(0, 2, 1) @ a_NRD
        residuals = fishers - np.einsum("nk,kd,ke->nde", w_NK.astype(np.float64), h_KD, h_KD)
        return float((np.square(residuals).sum((1, 2)) * weights_N)[fit_N].sum())

    assert summary["loss"] == pytest.approx(weighted_loss(run), rel=1e-5)
    assert weighted_loss(run) < weighted_loss(plain) * 0.999
    assert summary["n_fit"] == (fit_N & (weights_N > 0)).sum()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (None, "have no column 'weight' for factorization.example_weights: name one of example, id"),
        (np.where(np.arange(60) == 3, -1.0, 1.0), "every weight must be a finite number, 0 or more"),
        (np.where(np.arange(60) == 3, np.nan, 1.0), "every weight must be a finite number, 0 or more"),
        (["heavy"] * 60, "every weight must be a finite number, 0 or more"),
        (np.zeros(60), "all fitted examples have weight zero"),
    ],
)
def test_weights_that_cannot_be_are_refused(values: Any, said: str, factorized: RunDirectory, tmp_path: Path) -> None:
    run = beside(factorized, tmp_path / "run", example_weights="weight")
    if values is not None:
        with_column(run, "weight", values)
    with pytest.raises(InvalidProblemError, match=said):
        npeff.factorize(run)
    assert not run.factorization.exists()


def test_a_column_of_weights_that_the_task_does_not_give_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path / "run", example_weights="importance"))
    with pytest.raises(InvalidProblemError, match="have no column 'importance'"):
        npeff.compute_fishers(run)
    assert not run.fishers.exists()


def test_new_examples_are_transformed_in_a_new_run(factorized: RunDirectory, tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text(config(tmp_path / "new", limit=40).to_yaml())
    with pytest.raises(SystemExit) as end:
        main(["transform", str(factorized.path), "--run", str(file)])
    assert end.value.code in (0, None)
    new = RunDirectory.open(tmp_path / "new")
    components_KD, coefficients_NK = arrays(new)
    np.testing.assert_array_equal(components_KD, arrays(factorized)[0])
    factors_NRD = FisherStore.open(new.fishers).read_rows(np.arange(40), ["factors"])["factors"]
    h_KD, a_NRD = torch.from_numpy(components_KD), torch.from_numpy(factors_NRD).double()
    expected = nnls((a_NRD @ h_KD.T).square().sum(dim=1), (h_KD @ h_KD.T).square())
    np.testing.assert_allclose(coefficients_NK, expected, atol=1e-5)
    assert npeff.transform(new, factorized.path)["stopped"] == "transformed"
    assert npeff.ComponentStore.open(new.path).top_examples(0, n=2).num_rows == 2
    (new.factorization / "components/c/0/0").unlink()
    assert [each.what for each in npeff.check(new)] == ["factorization"]
    assert npeff.check(new, recompute=True) == []
    assert (recorded(new, FACTORIZE) or {})["stopped"] == "transformed"
    for mended, before in zip(arrays(new), (components_KD, coefficients_NK), strict=True):
        np.testing.assert_array_equal(mended, before)


@pytest.mark.parametrize(
    ("changes", "said"), [({"seed": 1}, "sketch or seed"), ({"n_components": 4}, "has 3 components")]
)
def test_a_run_of_another_space_is_refused(
    factorized: RunDirectory, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    new = RunDirectory.create(config(tmp_path / "new", limit=20, **changes))
    with pytest.raises(NpeffError, match=said) as caught:
        npeff.transform(new, factorized.path)
    assert "\n" not in str(caught.value)
    assert not new.factorization.exists()


def test_another_model_and_other_parameters_are_refused(factorized: RunDirectory, tmp_path: Path) -> None:
    document = config(tmp_path / "new", limit=20).model_dump()
    document["task"]["options"]["epochs"] = 2
    document["parameters"] = {"exclude": ["*bias"]}
    with pytest.raises(RunDirectoryError, match="differ in parameters, model"):
        npeff.transform(RunDirectory.create(RunConfig.model_validate(document)), factorized.path)


def test_a_run_with_components_of_its_own_is_not_transformed(factorized: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(factorized.path, tmp_path / "run")
    with pytest.raises(RunDirectoryError, match="has been factorized already"):
        npeff.transform(RunDirectory.open(tmp_path / "run"), factorized.path)


def test_metrics_without_tensorboard_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        metrics_writer(tmp_path, "tensorboard")


def test_metrics_are_events_that_tensorboard_reads(factorized: RunDirectory, tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs pip install tensorboard"
    )
    run = beside(factorized, tmp_path / "run", metrics="tensorboard")
    npeff.factorize(run)
    events = reader.EventAccumulator(str(run.metrics)).Reload()
    history = read_table(run.table("history"), "history").to_pydict()
    for tag in events.Tags()["scalars"]:
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in found] == history["iteration"]
        if (column := tag.rpartition("/")[2]) in ("loss", "explained"):
            np.testing.assert_allclose([value for _, value in found], history[column], rtol=1e-6)
    assert {"loss", "explained"} <= {tag.rpartition("/")[2] for tag in events.Tags()["scalars"]}


def test_metrics_are_in_a_run_of_mlflow(
    factorized: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = beside(factorized, tmp_path / "run", metrics="mlflow")
    npeff.factorize(run)
    client = mlflow.MlflowClient(tracking_uri=(run.metrics / "mlruns").as_uri())
    found = client.get_metric_history((run.metrics / "mlflow-run").read_text(), "loss")
    history = read_table(run.table("history"), "history").to_pydict()
    assert [each.step for each in found] == history["iteration"]
    np.testing.assert_allclose([each.value for each in found], history["loss"])
