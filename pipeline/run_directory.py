"""`RunDirectory`: where a run's files are, what made them, and how far each stage has come.

A stage is *missing* (nothing of it is there), *partial* (some is) or *complete*: complete means that its record
``stages/<stage>.json`` exists, which is written last, by rename, after everything it speaks of. A crash before that
leaves the stage partial, and the same command goes on from what is there. A run may be on an object store.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipeline.config import ConfigError, RunConfig
from pipeline.errors import NpeffError
from pipeline.store.atomic import is_committed, write_file_atomically
from pipeline.store.errors import StoreError
from pipeline.store.location import is_remote, location

_WORKERS_END_S = 60.0
"""Longest wait for the workers of an earlier command to end."""

_LEASE = ".workers"

_PACKAGES = ("npeff-pipeline", "torch", "ray", "zarr", "dask", "numpy", "scipy", "pyarrow", "scikit-learn")

_held: set[Path] = set()
"""Runs that this process holds the lock of."""


class RunDirectoryError(NpeffError):
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

        ``executor``, ``selection``, ``repair``, ``report``, ``run_dir``, and of ``lift`` the components and the
        memory limit, may differ from the stored configuration (no other stage's result depends on them),
        ``factorization.n_components`` as long as nothing is factorized (`npeff select` may have found a better one),
        and ``factorization.max_iterations`` may be larger, which ``run.yaml`` then says. Any other difference is
        refused, and nothing is written.

        Raises:
            RunDirectoryError: the folder holds another run, is not a run's folder, or cannot be written.
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
                        f"{path} holds a run with another configuration (it differs in {', '.join(different)}): "
                        f"choose another run_dir, or delete that folder{harmless} to start over"
                    )
            elif path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
                raise RunDirectoryError(f"{path} is not empty and holds no run.yaml: choose another run_dir")
            if not is_remote(path):
                path.mkdir(parents=True, exist_ok=True)
                if not os.access(path, os.W_OK | os.X_OK):
                    raise RunDirectoryError(
                        f"cannot write to {path} (permission denied): mend this or choose another run_dir"
                    )
            run = cls(path, config)
            if not stored.exists() or _stored_config(stored).factorization != config.factorization:
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
        path = _absolute(path)
        if not (path / "run.yaml").exists():
            wrong = "it is a file: give" if path.is_file() else "it has no run.yaml: give a run file, or"
            raise RunDirectoryError(f"no run in {path} ({wrong} the directory of an `npeff run`)")
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
        """The edited model, and what was done to it."""
        return self.path / "repair"

    @property
    def task_cache(self) -> Path:
        """Where the task keeps what it prepares once: a trained model, tokenized text."""
        return self.path / "task"

    def partial_results(self, stage: str) -> Path:
        """Results of a stage's finished units, which it goes on from after a crash; they stay when it is complete."""
        return self.path / "partial" / stage

    @property
    def worker_lease(self) -> Path | None:
        """Every worker process holds a shared lock on this file while it lives.

        There is no such thing on an object store. Workers that outlive a killed command do no harm there: a shard's
        content is the same whoever computes it, and its first record stands; a checkpoint's folder is of one attempt.
        They end with the command's Ray long before its lock, which nobody renews, can be taken over.
        """
        return None if is_remote(self.path) else self.path / _LEASE

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the kernel lets go when the process ends, however it ends. On an object store
        `pipeline.store.object_lock` does, after a minute.

        A stage may lock the run that the whole pipeline holds already. Workers of a command that was killed outlive it
        by seconds and may be writing: this waits for their end.

        Raises:
            RunDirectoryError: another process is working on this run, workers of an earlier one do not end, or the
                folder is gone or cannot be written.
        """
        if self.path in _held:
            yield
            return
        with self._remote_lock() if is_remote(self.path) else self._local_lock():
            _held.add(self.path)
            try:
                yield
            finally:
                _held.remove(self.path)

    @contextmanager
    def _remote_lock(self) -> Iterator[None]:
        from pipeline.store.object_lock import HeldError, object_lock
        from pipeline.store.objects import abort_uploads
        from pipeline.store.s3 import LOCK

        try:
            with object_lock(self.path / LOCK, _owner()):
                abort_uploads(self.path)
                yield
        except HeldError as error:
            raise self._in_use(str(error)) from None

    @contextmanager
    def _local_lock(self) -> Iterator[None]:
        try:
            file = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115  (closed below)
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write to {self.path} ({error.strerror}): mend this or choose another run_dir"
            ) from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise self._in_use(file.read().strip() or "starting") from None
            file.truncate(0)
            file.write(_owner())
            file.flush()
            self._wait_for_former_workers(self.path / _LEASE)
            yield

    def _in_use(self, by: str) -> RunDirectoryError:
        return RunDirectoryError(
            f"{self.path} is in use by another run ({by}): wait for it, stop it, or choose another run_dir"
        )

    def record(self, stage: str) -> dict[str, Any] | None:
        """What a complete stage said of itself; None before that.

        Raises:
            RunDirectoryError: the record is damaged.
        """
        path = self.path / "stages" / f"{stage}.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            record = None
        if not isinstance(record, dict) or record.get("stage") != stage:
            raise RunDirectoryError(f"{path} is damaged: delete it and run `npeff {stage} {self.path}` again")
        return record

    def reopen(self, stage: str) -> None:
        """A complete stage is partial again, as something that it goes on from is being made anew."""
        (self.path / "stages" / f"{stage}.json").unlink(missing_ok=True)

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

    def _wait_for_former_workers(self, leased: Path) -> None:
        deadline = time.monotonic() + _WORKERS_END_S
        with open(leased, "a", encoding="utf-8") as lease:
            while True:
                try:
                    fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise RunDirectoryError(
                            f"workers of an earlier command are still alive and may write to {self.path}: end them "
                            "(their processes are called ray::_Worker) and run the same command again"
                        ) from None
                    time.sleep(0.05)

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
                f"cannot write {target} ({error.strerror}): mend this and run the same command again"
            ) from None


def _absolute(run_dir: str | Path) -> Path:
    try:
        return location(run_dir).expanduser().absolute()
    except StoreError as error:
        raise RunDirectoryError(f"run_dir: {error}") from None


def _owner() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _stored_config(path: Path) -> RunConfig:
    try:
        return RunConfig.from_yaml(path)
    except ConfigError as error:
        raise RunDirectoryError(f"the run's own configuration is damaged: {error}; restore it from a copy") from None


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
