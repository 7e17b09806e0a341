"""Runs as jobs of a Ray cluster: submit one, follow it, stop it, ask how far it is.

A run's jobs are called ``npeff-NAME-HASH-NUMBER``. Name and hash are those of its run directory, so that every machine
finds the job that works on it; the number counts its jobs. Ray takes an id only once: of two submissions at the same
time one is the job, and the other finds it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from npeff.execution.executor import ExecutorError
from npeff.execution.ray.authentication import Authentication

_ENTRYPOINT = "python -m npeff run /dev/stdin <<'END_OF_RUN_FILE'\n{run_yaml}\nEND_OF_RUN_FILE"
"""What the cluster's shell is given: the run file travels in the command, whatever the working directory is."""

_STOP_WAIT_S = 30
"""How long Ray lets a stopped job end by itself before it is killed; without this, 3 s."""
_END_WAIT_S = 15.0
"""Wait for Ray to say how a job ended whose log has."""
_START_WAIT_S = 60.0
"""Wait for a head that has just been started to take jobs."""
_NOT_READY, _TAKEN, _UNKNOWN = "No available agent", "already exists", "does not exist"
"""In the text of Ray's plain RuntimeError, which is all that its client makes of the server's answer and its status."""
_LOOK_EVERY_S = 0.2
_TELLS_OF_UPLOADS = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")


@dataclass(frozen=True)
class Submission:
    """A run to be submitted."""

    run_dir: str
    """As the cluster sees it: an absolute path or a URI."""
    run_yaml: str
    """The resolved run file."""
    environment: dict[str, str] = field(default_factory=dict)
    pip: tuple[str, ...] = ()
    py_modules: tuple[Path, ...] = ()
    """Packages to send along, such as the one that defines the task."""
    working_dir: str | None = None
    """A folder here, or the URI of a zip file, that the job starts in; an empty one without it."""
    resources: dict[str, Any] = field(default_factory=dict)
    """Of the entry point, under Ray's names: ``entrypoint_num_cpus`` and so on."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.run_yaml.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """How a job is."""

    id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    since: float
    """When it came into this state, in seconds since 1970; when it was submitted, where it has not ended."""
    exit_code: int | None
    message: str
    digest: str
    """Of the run file it was submitted with."""

    @property
    def has_ended(self) -> bool:
        return self.state in ("SUCCEEDED", "STOPPED", "FAILED")


def in_job() -> bool:
    """Whether this process was started by a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def job_prefix(run_dir: str) -> str:
    """What the ids of all jobs of a run begin with."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(run_dir).name).strip("-")[:40] or "run"
    return f"npeff-{name}-{hashlib.sha256(run_dir.rstrip('/').encode()).hexdigest()[:8]}"


class JobServer:
    """A cluster's job server.

    Args:
        address: ``http://HEAD:8265``.

    Raises:
        ExecutorError: there is no job server, or it does not let us in; so do all methods when it is lost.
    """

    def __init__(self, address: str) -> None:
        if _has_token() and (found := Authentication.current()).mode is None:
            replace(found, mode="token").use()  # Ray's clients leave it at home unless they are told so
        from ray.job_submission import JobSubmissionClient

        for name in _TELLS_OF_UPLOADS:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        try:
            self._client = JobSubmissionClient(address)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            raise ExecutorError(
                f"cannot reach the job server at {address} ({_reason(error)}): is `ray start --head` running there, "
                "and does this machine have the cluster's authentication token?"
            ) from None

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        """The job of a run, and whether it is new: one that has not ended is the run's job still.

        Raises:
            ExecutorError: the cluster refuses it, or the run's job works with another run file.
        """
        prefix, until = job_prefix(submission.run_dir), time.monotonic() + _START_WAIT_S
        while True:
            last = self.latest(submission.run_dir)
            if last is not None and not last.has_ended:
                if last.digest != submission.digest:
                    raise ExecutorError(
                        f"job {last.id} works on {submission.run_dir} with another run file: wait for it, or stop it "
                        f"(npeff submit --stop {last.id} --address {self.address}) and submit again"
                    )
                return last, False
            number = 1 if last is None else _number(last.id, prefix) + 1
            try:
                self._send(submission, f"{prefix}-{number}")
            except (OSError, RuntimeError, ValueError) as error:
                if _TAKEN in str(error):  # somebody was quicker
                    continue
                if _NOT_READY in str(error) and time.monotonic() < until:
                    time.sleep(_LOOK_EVERY_S)
                    continue
                raise ExecutorError(f"{self.address} did not take the job: {_reason(error)}") from None
            return self.job(f"{prefix}-{number}"), True

    def latest(self, run_dir: str) -> Job | None:
        """The last job of a run that this cluster knows of."""
        prefix = job_prefix(run_dir)
        with self._asking():
            found = [details for details in self._client.list_jobs() if _number(details.submission_id, prefix)]
        return _job(max(found, key=lambda details: _number(details.submission_id, prefix))) if found else None

    def job(self, job_id: str) -> Job:
        with self._asking():
            return _job(self._client.get_job_info(job_id))

    def last_line(self, job_id: str) -> str:
        """The last line of a job's log."""
        with self._asking():
            lines = self._client.get_job_logs(job_id).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def follow(self, job_id: str, say: Callable[[str], None]) -> Job:
        """Give `say` the job's log from its beginning, as it comes; the job, when it has ended."""

        async def tail() -> None:
            async for lines in self._client.tail_job_logs(job_id):
                say(lines)

        with self._asking():
            asyncio.run(tail())
        return self._ended(job_id, _END_WAIT_S)

    def stop(self, job_id: str) -> Job:
        """End a job as Ctrl-C would end its command, and wait for that; what is finished is kept."""
        with self._asking():
            self._client.stop_job(job_id)
        return self._ended(job_id, _STOP_WAIT_S + _END_WAIT_S)

    def _send(self, submission: Submission, job_id: str) -> None:
        package = Path(__file__).parents[1]  # the cluster runs the version that submits
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "run.yaml").write_text(submission.run_yaml, encoding="utf-8")
            environment: dict[str, Any] = {
                "working_dir": submission.working_dir or folder,
                "py_modules": [str(path) for path in (package, *submission.py_modules)],
                "excludes": ["**/__pycache__"],
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S), **submission.environment},
            }
            if submission.pip:
                environment["pip"] = list(submission.pip)
            self._client.submit_job(
                entrypoint=_ENTRYPOINT.format(run_yaml=submission.run_yaml.rstrip("\n")),
                submission_id=job_id,
                runtime_env=environment,
                metadata={"npeff_run_dir": submission.run_dir, "npeff_run_file": submission.digest},
                **submission.resources,
            )

    def _ended(self, job_id: str, wait_s: float) -> Job:
        until = time.monotonic() + wait_s
        while not (job := self.job(job_id)).has_ended and time.monotonic() < until:
            time.sleep(_LOOK_EVERY_S)
        return job

    @contextmanager
    def _asking(self) -> Iterator[None]:
        import aiohttp

        try:
            yield
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            if _UNKNOWN in str(error):
                raise ExecutorError(f"{self.address}: {_reason(error)}") from None
            raise ExecutorError(
                f"lost the job server at {self.address} ({_reason(error)}); what is finished is kept: when the cluster "
                "is back, the same command follows the job, or resumes the run if the job is gone"
            ) from None


def _job(details: Any) -> Job:
    milliseconds = details.end_time or details.start_time or 0
    code = details.driver_exit_code
    return Job(
        id=details.submission_id,
        state=str(details.status),
        since=milliseconds / 1000,
        exit_code=code if code is None or code >= 0 else 128 - code,  # killed by a signal, as a shell says it
        message=details.message or "",
        digest=(details.metadata or {}).get("npeff_run_file", ""),
    )


def _number(job_id: str | None, prefix: str) -> int:
    """Which job of the run it is; 0 if it is none."""
    found = re.fullmatch(re.escape(prefix) + r"-(\d+)", job_id or "")
    return int(found[1]) if found else 0


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


def _reason(error: Exception) -> str:
    """The line of an error that says why: of a traceback from the server, the last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "Traceback" in lines[0] else lines[0]
