"""The solver's history in Weights & Biases and in MLflow.

Both identify a run of theirs by a text. It is stored in the folder ``metrics`` of the factorization, so that a command
that resumes a factorization continues the same run there. A row whose iteration is repeated after a crash has the same
number as the former one, and both are shown at it.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from npeff.errors import as_one_line
from npeff.runs.config_reading import ConfigError
from npeff.storage.atomic import write_file_atomically
from npeff.storage.location import is_remote

PROJECT = "npeff"
"""Project of Weights & Biases, and experiment of MLflow. The variables of both programs choose another one."""


class WandB:
    """Logs each row to a run of Weights & Biases.

    The variables of the program apply, such as ``WANDB_MODE=offline``, ``WANDB_PROJECT`` and ``WANDB_API_KEY``.

    Args:
        folder: The folder ``metrics``.
        name: Name of the run.

    Raises:
        ConfigError: wandb is not installed, or does not start.
    """

    def __init__(self, folder: Path, name: str) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                "factorization.metrics: wandb needs wandb: pip install 'npeff-pipeline[wandb]', or choose jsonl"
            ) from None
        identifier = _identifier(folder / "wandb-run") or secrets.token_hex(8)
        _remember(folder / "wandb-run", identifier)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=name,
                id=identifier,
                resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
                dir=None if is_remote(folder) else str(folder),
                # the output of the command and the source code of the folder are nobody's business
                settings=wandb.Settings(console="off", disable_git=True, save_code=False, silent=True),
            )
        except Exception as error:  # the client raises any exception
            raise _cannot_start("wandb", error, "set WANDB_MODE=offline, or log in with `wandb login`") from None
        self._run.define_metric("factorize/*", step_metric="factorize/iteration")

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._run.log({f"factorize/{name}": float(value) for name, value in row.items()})

    def summarize(self, numbers: Mapping[str, float]) -> None:
        """Add final numbers to the run."""
        self._run.summary.update(dict(numbers))

    def close(self, failed: bool = False) -> None:
        self._run.finish(exit_code=int(failed))


class MLflow:
    """Logs each row to a run of MLflow.

    ``MLFLOW_TRACKING_URI`` names the server or the folder, and ``MLFLOW_EXPERIMENT_NAME`` the experiment. Without the
    first, the runs are in the folder ``metrics/mlruns``.

    Args:
        folder: The folder ``metrics``.
        name: Name of the run.

    Raises:
        ConfigError: MLflow is not installed, or there is no place for its runs, or its server refuses.
    """

    def __init__(self, folder: Path, name: str) -> None:
        address = os.environ.get("MLFLOW_TRACKING_URI")
        if not address:
            if is_remote(folder):
                raise ConfigError(
                    "factorization.metrics: mlflow needs MLFLOW_TRACKING_URI for a run in a bucket: set it"
                )
            address = (folder / "mlruns").absolute().as_uri()
        if address.startswith("file:") or "://" not in address:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a database needs packages beyond mlflow-skinny
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        except ImportError:
            raise ConfigError(
                "factorization.metrics: mlflow needs MLflow: pip install 'npeff-pipeline[mlflow]', or choose jsonl"
            ) from None
        self._metric = Metric
        try:
            self._client = MlflowClient(tracking_uri=address)
            self._id = self._resumed(_identifier(folder / "mlflow-run")) or self._created(name)
        except Exception as error:  # the client raises any exception
            raise _cannot_start("mlflow", error, "check MLFLOW_TRACKING_URI") from None
        _remember(folder / "mlflow-run", self._id)

    def __call__(self, row: Mapping[str, Any]) -> None:
        numbers = {name: float(value) for name, value in row.items() if name != "iteration"}
        found = [self._metric(name, value, 0, row["iteration"]) for name, value in numbers.items()]
        self._client.log_batch(self._id, [each for each in found if not math.isnan(each.value)])

    def summarize(self, numbers: Mapping[str, float]) -> None:
        """Add final numbers to the run."""
        self._client.log_batch(self._id, [self._metric(name, value, 0, 0) for name, value in numbers.items()])

    def close(self, failed: bool = False) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    def _resumed(self, identifier: str | None) -> str | None:
        """Continue a run. Returns None if there is none, or if it is on another server or deleted."""
        if identifier is None:
            return None
        try:
            self._client.update_run(identifier, "RUNNING")
        except Exception:  # the client raises any exception
            return None
        return identifier

    def _created(self, name: str) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        return str(self._client.create_run(number, run_name=name).info.run_id)


def _cannot_start(kind: str, error: Exception, remedy: str) -> ConfigError:
    return ConfigError(f"factorization.metrics: {kind} does not start ({as_one_line(error)}): {remedy}")


def _identifier(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() or None if file.exists() else None


def _remember(file: Path, identifier: str) -> None:
    write_file_atomically(file, lambda stream: stream.write(identifier.encode()))
