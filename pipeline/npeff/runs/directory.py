"""`RunDirectory`: the files of a run, its configuration, and the state of each stage.

A stage is *missing* (it has no results), *partial* (it has some) or *complete* (its record ``stages/<stage>.json``
exists). The record is written last, by a rename, after everything that it describes. A crash before that leaves the
stage partial, and the same command resumes from the existing results. A run directory may be on an object store.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from npeff.runs import settings
from npeff.runs.config import RunConfig
from npeff.runs.errors import RunDirectoryError, damaged_record
from npeff.runs.lock import LEASE, run_lock
from npeff.storage.atomic import is_committed, write_file_atomically
from npeff.storage.errors import StoreError
from npeff.storage.location import absolute_location, is_remote, location
from npeff.store.run_files import (
    FilesOfRun,
    chosen_factorization,
    factorization_names,
    refuse_unfinished_migration,
    run_and_name,
)
from npeff.variables import literal, resolved


class StageState(StrEnum):
    MISSING = "missing"
    PARTIAL = "partial"
    COMPLETE = "complete"


@dataclass(frozen=True)
class RunDirectory(FilesOfRun):
    """The directory of a run, with one of its factorizations.

    `open` only reads. `create` also creates the directory of a new run. Changed settings of an existing run are written
    when the run is locked for the first time, so that a command that is refused changes nothing.

    Attributes:
        path: The directory.
        config: The configuration of the run and of the factorization.
    """

    path: Path
    config: RunConfig
    unsettled: bool = field(default=False, repr=False, compare=False)
    """Whether the configuration is to be written when the run is locked."""
    stored_as: RunConfig | None = field(default=None, repr=False, compare=False)
    """The configuration that is then written, if that of this command is another one."""

    @classmethod
    def create(cls, config: RunConfig, check: Callable[[RunConfig], object] | None = None) -> RunDirectory:
        """Create a run directory, or open an existing one with the same configuration.

        Some keys may differ from the stored configuration: ``executor``, ``selection``, ``inputs``, ``step``,
        ``repair``, ``scale``, ``report``, ``run_dir``, ``lift.components`` and the memory limits, because no result of
        another stage depends on them. All keys of ``factorization``, ``lift`` and ``verification`` may differ as long
        as nothing is factorized, for example after `npeff select`, and a name in ``factorization.name`` that the run
        does not have adds a factorization. ``factorization.max_iterations`` may be any number that is not smaller than
        the number of steps done. Any other difference raises an error, and nothing is written. If ``config`` lacks the
        section ``inputs`` or ``scale``, the stored one applies.

        Args:
            config: The configuration of the run.
            check: Function that raises an error if a run must not be created with this configuration. It is called
                before a new directory is made, and not for an existing one.

        Raises:
            RunDirectoryError: The directory holds another run, or another factorization of this name, is not a run
                directory, or cannot be written.
        """
        path = _absolute(config.resolved("run_dir"))
        try:
            if (path / "run.yaml").exists():
                refuse_unfinished_migration(path)
                stored = settings.stored_config(path, config.factorization.name)
                config = config.with_texts_of(stored).with_sections_of(stored)
                run = cls(path, config, unsettled=True)
                settings.refuse_other_settings(run)
                return run
            if path.exists() and any(not entry.name.startswith(".") for entry in path.iterdir()):
                raise RunDirectoryError(
                    f"{path} is not empty and holds no run.yaml", "choose another run_dir", path=path
                )
            if check is not None:
                check(config)
            if not is_remote(path):
                path.mkdir(parents=True, exist_ok=True)
                if not os.access(path, os.W_OK | os.X_OK):
                    raise RunDirectoryError(
                        f"cannot write to {path} (permission denied)", "fix this or choose another run_dir", path=path
                    )
            settings.refuse_other_fishers(config)
            run = cls(path, config, unsettled=True)
            with run.lock():
                pass  # writes the configuration
        except OSError as error:
            raise RunDirectoryError(
                f"cannot write to {path} ({error.strerror})", "fix this or choose another run_dir", path=path
            ) from None
        return run

    @classmethod
    def open(cls, path: str | Path, factorization: str | None = None) -> RunDirectory:
        """Open an existing run with its stored configuration.

        Args:
            path: The run directory, or the folder ``factorizations/NAME`` of a run.
            factorization: Name of the factorization. The default is ``default``, or the only one.

        Raises:
            RunDirectoryError: The path is not a run directory, or the run has no factorization of this name.
        """
        path, named = run_and_name(_absolute(path))
        if not (path / "run.yaml").exists():
            wrong = "it is a file: give" if path.is_file() else "it has no run.yaml: give a run file, or"
            raise RunDirectoryError(f"no run in {path} ({wrong} the directory of a run)")
        try:
            refuse_unfinished_migration(path)
            name = chosen_factorization(path, factorization or named)
        except StoreError as error:
            raise RunDirectoryError.of(error) from None
        config = settings.stored_config(path, name)
        return cls(path, config.model_copy(update={"run_dir": literal(str(path))}))

    @classmethod
    def open_any(cls, path: str | Path) -> RunDirectory:
        """Open an existing run with the first of its factorizations, for what all of them share.

        Raises:
            RunDirectoryError: The path is not a run directory.
        """
        folder, named = run_and_name(_absolute(path))
        return cls.open(folder, named or next(iter(factorization_names(folder)), None))

    @property
    def name(self) -> str:
        return self.config.factorization.name

    @property
    def fishers_home(self) -> Path:
        other = self.config.fishers.from_
        return self.path if other is None else location(resolved(other, "fishers.from"))

    def factorizations(self) -> list[str]:
        """Return the names of the factorizations of the run."""
        return factorization_names(self.path)

    def with_factorization(self, name: str) -> RunDirectory:
        """Return the run with another of its factorizations, with the same executor."""
        other = RunDirectory.open(self.path, name)
        return other.with_config(other.config.model_copy(update={"executor": self.config.executor}))

    def with_config(self, config: RunConfig) -> RunDirectory:
        """Return the run with another configuration, for one command. It is not stored."""
        return replace(self, config=config, stored_as=self.stored_as or self.config)

    def is_defined(self) -> bool:
        """Return whether the settings of the factorization are stored, or are stored when the run is locked."""
        return self.unsettled or settings.is_defined(self)

    @property
    def worker_lease(self) -> Path | None:
        """File on which every worker process holds a shared lock until it ends; None on an object store.

        On an object store, workers that outlive a killed command are harmless. The content of a shard does not depend
        on the worker, and the first record of a shard is final. The folder of a checkpoint belongs to one attempt. The
        workers end with the Ray cluster of the command, long before its lock expires.
        """
        return None if is_remote(self.path) else self.path / LEASE

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run for this process; see `npeff.runs.lock.run_lock`. The first time, write changed settings.

        Raises:
            RunDirectoryError: Another process uses the run, workers of an earlier command do not end, or the directory
                is missing or cannot be written; or another command has changed the settings since they were compared.
        """
        with run_lock(self.path):
            if self.unsettled:
                settings.settle(replace(self, config=self.stored_as or self.config))
                object.__setattr__(self, "unsettled", False)
            yield

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
            raise damaged_record(self, stage)
        return record

    def reopen(self, stage: str) -> None:
        """Delete the record of a stage whose inputs are recomputed. The stage is then partial."""
        self.record_file(stage).unlink(missing_ok=True)

    def complete(self, stage: str, summary: dict[str, Any]) -> dict[str, Any]:
        """Write the record of a stage. Call this after all results of the stage are durable."""
        summary = {"stage": stage, **summary, "completed_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        self.write(self.record_file(stage), json.dumps(summary, indent=2))
        return summary

    def state(self, stage: str, outputs: tuple[Path, ...]) -> StageState:
        """Return the state of a stage that writes to ``outputs``."""
        if self.record(stage) is not None:
            return StageState.COMPLETE
        begun = any(path.is_file() or (path.is_dir() and any(path.iterdir())) for path in outputs)
        return StageState.PARTIAL if begun else StageState.MISSING

    def has_results(self) -> bool:
        """Return whether the run has Fishers or a complete stage."""
        return is_committed(self.fishers) or (self.path / "stages").exists()

    def write(self, target: Path, text: str) -> None:
        """Create or replace a text file of the run."""
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
        return absolute_location(run_dir)
    except StoreError as error:
        raise RunDirectoryError(f"run_dir: {error.problem}", error.remedy) from None
