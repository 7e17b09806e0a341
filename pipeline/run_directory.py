"""`RunDirectory`: where a run's files are, what made them, and how far each stage has come.

A stage is *missing* (nothing of it is there), *partial* (some is) or *complete*: complete means that its record
``stages/<stage>.json`` exists, which is written last, by rename, after everything it speaks of. A crash before that
leaves the stage partial, and the same command goes on from what is there.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig

_PACKAGES = ("npeff-pipeline", "torch", "ray", "zarr", "dask", "numpy", "scipy", "pyarrow", "scikit-learn")

_held: set[Path] = set()
"""Runs that this process holds the lock of."""


class RunDirectoryError(Exception):
    """A run directory that cannot be used; the message says why and what to do."""


class StageState(StrEnum):
    MISSING = "missing"
    PARTIAL = "partial"
    COMPLETE = "complete"


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run. Opening reads only; `create` makes the folder and its ``run.yaml``."""

    path: Path
    config: RunConfig

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Make the run's folder, or take up an existing one that holds the same configuration.

        ``executor``, ``report`` and ``run_dir`` may differ from the stored configuration (no result depends on them);
        any other difference is refused, and nothing is written.

        Raises:
            RunDirectoryError: the folder holds another run, is not a run's folder, or cannot be written.
        """
        if "://" in config.run_dir:
            raise RunDirectoryError(
                f"run_dir {config.run_dir!r} is a URI: this version writes runs to local paths only"
            )
        path = Path(config.run_dir).absolute()
        stored = path / "run.yaml"
        try:
            if stored.exists():
                different = config.differences(RunConfig.from_yaml(stored))
                if different:
                    raise RunDirectoryError(
                        f"{path} holds a run with another configuration (it differs in {', '.join(different)}): "
                        "choose another run_dir, or delete that folder to start over"
                    )
            elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
                raise RunDirectoryError(f"{path} is not empty and holds no run.yaml: choose another run_dir")
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise RunDirectoryError(
                    f"cannot write to {path} (permission denied): mend this or choose another run_dir"
                )
            run = cls(path, config)
            if not stored.exists():
                run._write("run.yaml", config.to_yaml())
            if not (path / "provenance.json").exists():
                run._write("provenance.json", json.dumps(_provenance(config), indent=2))
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write to {path} ({error.strerror}): mend this or choose another run_dir"
            ) from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """An existing run, with the configuration that it was made with.

        Raises:
            RunDirectoryError: there is no run there.
        """
        path = Path(path).absolute()
        if not (path / "run.yaml").exists():
            raise RunDirectoryError(f"no run in {path} (it has no run.yaml)")
        config = RunConfig.from_yaml(path / "run.yaml")
        return cls(path, config.model_copy(update={"run_dir": str(path)}))

    @property
    def fishers(self) -> Path:
        return self.path / "fishers.zarr"

    @property
    def shard_records(self) -> Path:
        return self.path / "shards"

    @property
    def factorization(self) -> Path:
        return self.path / "factorization.zarr"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def directions(self) -> Path:
        return self.path / "directions.zarr"

    @property
    def tables(self) -> Path:
        return self.path / "tables"

    def table(self, name: str) -> Path:
        return self.tables / f"{name}.parquet"

    @property
    def report(self) -> Path:
        return self.path / "report" / "index.html"

    @property
    def task_cache(self) -> Path:
        """Where the task keeps what it prepares once: a trained model, tokenized text."""
        return self.path / "task"

    def partial_results(self, stage: str) -> Path:
        """Results of a stage's finished units, kept until the stage is complete."""
        return self.path / "partial" / stage

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the kernel lets go when the process ends, however it ends.

        A stage may lock the run that the whole pipeline holds already.

        Raises:
            RunDirectoryError: another process is working on this run.
        """
        if self.path in _held:
            yield
            return
        with open(self.path / ".lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunDirectoryError(
                    f"{self.path} is in use by another run ({file.read().strip() or 'starting'}): "
                    "wait for it, stop it, or choose another run_dir"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            _held.add(self.path)
            try:
                yield
            finally:
                _held.remove(self.path)

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a complete stage said of itself; None before that."""
        try:
            text = (self.path / "stages" / f"{stage}.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        return dict(json.loads(text))

    def complete(self, stage: str, summary: dict[str, Any]) -> dict[str, Any]:
        """Declare a stage complete; call it after everything else of the stage is on disk."""
        summary = {"stage": stage, **summary, "completed_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self._write(f"stages/{stage}.json", json.dumps(summary, indent=2))
        return summary

    def state(self, stage: str, outputs: tuple[Path, ...]) -> StageState:
        """How far ``stage`` has come, given the places it writes to."""
        if self.record(stage) is not None:
            return StageState.COMPLETE
        begun = any(path.is_file() or (path.is_dir() and any(path.iterdir())) for path in outputs)
        return StageState.PARTIAL if begun else StageState.MISSING

    def _write(self, name: str, text: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)


def _provenance(config: RunConfig) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "task": config.task.name,
        "seed": config.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_sha": _git_sha(),
    }


def _git_sha() -> str | None:
    """Commit of the checkout this package runs from, marked when files differ from it; None outside a checkout."""
    here = Path(__file__).parent
    try:
        sha = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if sha.returncode != 0:
        return None
    return sha.stdout.strip() + ("-dirty" if status.stdout.strip() else "")
