"""The history in Weights & Biases and in MLflow, offline: what is written, what a resumed command continues."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from npeff.runs.config_reading import ConfigError
from npeff.stages.factorize.live_history import history_written, write_summary

ROWS = [{"iteration": i, "loss": 1 / (i + 1), "explained": i / 10, "accepted": True} for i in range(4)]


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of the runs in a folder."""
    client = pytest.importorskip("mlflow", reason="needs pip install mlflow-skinny").MlflowClient
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return lambda folder: client(tracking_uri=folder.absolute().as_uri())


def write(folder: Path, kind: Any, rows: list[dict[str, Any]]) -> None:
    with history_written(folder, kind, "digits/default") as metrics:
        for row in rows:
            metrics(row)


def test_mlflow_has_every_number_at_its_iteration_in_one_run_that_is_resumed(mlflow, tmp_path: Path) -> None:
    write(tmp_path, "mlflow", ROWS[:2])
    first = (tmp_path / "mlflow-run").read_text()
    write(tmp_path, "mlflow", ROWS[2:])
    assert (tmp_path / "mlflow-run").read_text() == first
    client = mlflow(tmp_path / "mlruns")
    found = client.get_metric_history(first, "loss")
    assert [(each.step, each.value) for each in found] == [(row["iteration"], row["loss"]) for row in ROWS]
    assert client.get_run(first).info.status == "FINISHED"
    assert client.get_run(first).info.run_name == "digits/default"
    assert client.get_run(first).data.metrics == {"loss": 0.25, "explained": 0.3, "accepted": 1.0}
    write_summary(tmp_path, "mlflow", "digits/default", {"verify/fit/median_kl_ratio": 4.0})
    assert client.get_run(first).data.metrics["verify/fit/median_kl_ratio"] == 4.0
    assert client.get_run(first).info.status == "FINISHED"
    write_summary(tmp_path, "jsonl", "digits/default", {"verify/fit/median_kl_ratio": 4.0})  # has no place for it


def test_mlflow_is_told_of_a_failure_and_skips_numbers_that_are_not_known(mlflow, tmp_path: Path) -> None:
    rows: Any = [{"iteration": 0, "loss": 1.0, "objective": float("nan")}, {"loss": 2.0}]
    with pytest.raises(KeyError):  # of a row without an iteration
        write(tmp_path, "mlflow", rows)
    run = mlflow(tmp_path / "mlruns").get_run((tmp_path / "mlflow-run").read_text())
    assert (run.info.status, run.data.metrics) == ("FAILED", {"loss": 1.0})


def test_mlflow_starts_another_run_where_the_former_one_is_not(
    mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "mlflow", ROWS[:1])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "elsewhere").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    write(tmp_path, "mlflow", ROWS[1:2])
    client = mlflow(tmp_path / "elsewhere")
    run = client.get_run((tmp_path / "mlflow-run").read_text())
    assert client.get_experiment(run.info.experiment_id).name == "mine"


@pytest.mark.slow
@pytest.mark.process
def test_wandb_offline_writes_one_run_that_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    try:
        write(tmp_path, "wandb", ROWS)
        identifier = (tmp_path / "wandb-run").read_text()
        time.sleep(1.1)  # folders of the same second have the same name
        write_summary(tmp_path, "wandb", "digits/default", {"verify/fit/median_kl_ratio": 4.0})
    finally:
        wandb.teardown()  # its process ends
    assert (tmp_path / "wandb-run").read_text() == identifier
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{identifier}/run-{identifier}.wandb"))
    content = b"".join(file.read_bytes() for file in files)
    assert b"verify/fit/median_kl_ratio" in content
    assert content.count(b"factorize/loss") >= len(ROWS)
    assert all(str(row["loss"]).encode() in content for row in ROWS[1:])
    assert not list((tmp_path / "wandb").glob("**/code/*"))


@pytest.mark.parametrize(("kind", "extra"), [("wandb", "wandb"), ("mlflow", "mlflow")])
def test_a_package_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(ConfigError, match=rf"pip install 'npeff-pipeline\[{extra}\]', or choose jsonl"):
        write(tmp_path, kind, ROWS)


def test_a_server_that_refuses_is_one_line(mlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match=r"mlflow does not start .*: check MLFLOW_TRACKING_URI") as caught:
        write(tmp_path, "mlflow", ROWS)
    assert "\n" not in str(caught.value)
