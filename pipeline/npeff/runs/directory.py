"""`RunDirectory`: the files of a run, its configuration, and the state of each stage.

A stage is *missing* (it has no results), *partial* (it has some) or *complete* (its record ``stages/<stage>.json``
exists). The record is written last, by a rename, after everything that it describes. A crash before that leaves the
stage partial, and the same command resumes from the existing results. A run directory may be on an object store.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from npeff.runs.config import RunConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.errors import RunDirectoryError, damaged_record
from npeff.runs.lock import LEASE, run_lock
from npeff.runs.provenance import provenance
from npeff.storage.atomic import is_committed, write_file_atomically
from npeff.storage.errors import StoreError
from npeff.storage.location import is_remote, location


class StageState(StrEnum):
    MISSING = "missing"
    PARTIAL = "partial"
    COMPLETE = "complete"


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run. `open` only reads; `create` creates the directory and its ``run.yaml``.

    Attributes:
        path: The directory.
        config: The configuration of the run.
    """

    path: Path
    config: RunConfig

    @classmethod
    def create(cls, config: RunConfig) -> RunDirectory:
        """Create a run directory, or open an existing one with the same configuration.

        Some keys may differ from the stored configuration: ``executor``, ``selection``, ``repair``, ``report``,
        ``run_dir``, ``lift.components`` and the memory limits, because no result of another stage depends on them.
        ``factorization.n_components`` may differ as long as nothing is factorized, for example after `npeff select`.
        ``factorization.max_iterations`` may be larger; ``run.yaml`` is then updated. Any other difference raises an
        error, and nothing is written.

        Args:
            config: The configuration of the run.

        Raises:
            RunDirectoryError: The directory holds another run, is not a run directory, or cannot be written.
        """
        path = _absolute(config.run_dir)
        stored = path / "run.yaml"
        try:
            if stored.exists():
                different = config.differences(_stored_config(stored))
                another_number = different == ["factorization.n_components"]
                if different and not (another_number and not cls(path, config)._has_factorization()):
                    harmless = "" if cls(path, config)._has_results() else " (it has no results yet)"
                    raise RunDirectoryError(
                        f"{path} holds a run with another configuration (it differs in {', '.join(different)})",
                        f"choose another run_dir, or delete {path}{harmless} to start over",
                        path=path,
                    )
            elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
                raise RunDirectoryError(
                    f"{path} is not empty and holds no run.yaml", "choose another run_dir", path=path
                )
            if not is_remote(path):
                path.mkdir(parents=True, exist_ok=True)
                if not os.access(path, os.W_OK | os.X_OK):
                    raise RunDirectoryError(
                        f"cannot write to {path} (permission denied)", "fix this or choose another run_dir", path=path
                    )
            run = cls(path, config)
            if not stored.exists() or _stored_config(stored).factorization != config.factorization:
                run._write("run.yaml", config.to_yaml())
            if not (path / "provenance.json").exists():
                run._write("provenance.json", json.dumps(provenance(config), indent=2))
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write to {path} ({error.strerror})", "fix this or choose another run_dir", path=path
            ) from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Open an existing run with its stored configuration.

        Args:
            path: The run directory.

        Raises:
            RunDirectoryError: The path is not a run directory.
        """
        path = _absolute(path)
        if not (path / "run.yaml").exists():
            wrong = "it is a file: give" if path.is_file() else "it has no run.yaml: give a run file, or"
            raise RunDirectoryError(f"no run in {path} ({wrong} the directory of a run)")
        config = _stored_config(path / "run.yaml")
        return cls(path, config.model_copy(update={"run_dir": str(path)}))

    @property
    def fishers(self) -> Path:
        return self.path / "fishers.zarr"

    @property
    def diagonal_fisher(self) -> Path:
        return self.path / "diagonal_fisher.safetensors"

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
    def repaired(self) -> Path:
        """The edited model of the stage repair, and the record of the edits."""
        return self.path / "repair"

    @property
    def task_cache(self) -> Path:
        """The files that the task prepares once, such as a trained model or tokenized text."""
        return self.path / "task"

    def partial_results(self, stage: str) -> Path:
        """Results of the finished units of a stage, from which it resumes. They stay after the stage is complete."""
        return self.path / "partial" / stage

    @property
    def worker_lease(self) -> Path | None:
        """File on which every worker process holds a shared lock until it ends; None on an object store.

        On an object store, workers that outlive a killed command are harmless. The content of a shard does not depend
        on the worker, and the first record of a shard is final. The folder of a checkpoint belongs to one attempt. The
        workers end with the Ray cluster of the command, long before its lock expires.
        """
        return None if is_remote(self.path) else self.path / LEASE

    def lock(self) -> AbstractContextManager[None]:
        """Lock the run for this process; see `npeff.runs.lock.run_lock`.

        Raises:
            RunDirectoryError: Another process uses the run, workers of an earlier command do not end, or the directory
                is missing or cannot be written.
        """
        return run_lock(self.path)

    def record_file(self, stage: str) -> Path:
        """Return the path of the record of a stage, which exists if the stage is complete."""
        return self.path / "stages" / f"{stage}.json"

    def record(self, stage: str) -> dict[str, Any] | None:
        """Return the record of a complete stage; None if the stage is not complete.

        Raises:
            RunDirectoryError: The record is damaged.
        """
        path = self.record_file(stage)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            record = None
        if not isinstance(record, dict) or record.get("stage") != stage:
            raise damaged_record(self.path, stage)
        return record

    def reopen(self, stage: str) -> None:
        """Delete the record of a stage whose inputs are recomputed. The stage is then partial."""
        self.record_file(stage).unlink(missing_ok=True)

    def complete(self, stage: str, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the record of a stage. Call this after all results of the stage are durable."""
        summary = {"stage": stage, **summary, "completed_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self._write(f"stages/{stage}.json", json.dumps(summary, indent=2))
        return summary

    def state(self, stage: str, outputs: tuple[Path, ...]) -> StageState:
        """Return the state of a stage that writes to ``outputs``."""
        if self.record(stage) is not None:
            return StageState.COMPLETE
        begun = any(path.is_file() or (path.is_dir() and any(path.iterdir())) for path in outputs)
        return StageState.PARTIAL if begun else StageState.MISSING

    def _has_results(self) -> bool:
        return is_committed(self.fishers) or (self.path / "stages").exists()

    def _has_factorization(self) -> bool:
        begun = self.checkpoints.exists() or is_committed(self.factorization)
        return begun or self.record("factorize") is not None

    def _write(self, name: str, text: str) -> None:
        target = self.path / name
        if is_remote(target):
            write_file_atomically(target, lambda stream: stream.write(text.encode()))
            return
        temporary = target.with_name(f".{target.name}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            with suppress(OSError):  # the first error is the one to report
                temporary.unlink(missing_ok=True)
            raise RunDirectoryError(
                f"cannot write {target} ({error.strerror})", "fix this and run the same command again", path=target
            ) from None


def _absolute(run_dir: str | Path) -> Path:
    try:
        return location(run_dir).expanduser().absolute()
    except StoreError as error:
        raise RunDirectoryError(f"run_dir: {error.problem}", error.remedy) from None


def _stored_config(path: Path) -> RunConfig:
    try:
        return RunConfig.from_yaml(path)
    except ConfigError as error:
        problem = f"the stored configuration of the run is damaged: {error}"
        raise RunDirectoryError(problem, "restore it from a copy", path=path, separator="; ") from None
