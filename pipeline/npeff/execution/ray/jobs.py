"""Runs as jobs of a Ray cluster: submit, follow and stop a job, and read its state.

The jobs of a run have the ids ``npeff-NAME-HASH-NUMBER``. The name is that in the text ``run_dir`` of the run file.
The hash is that of the run directory, so that every machine can find the job of a run. The number counts the jobs of
the run. Ray accepts an id only once: if two processes submit a run at the same time, one creates the job and the other
finds it.

The command of a job contains the run file with the names of environment variables. No value is sent, except those of
`Submission.environment`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from npeff.errors import tell
from npeff.execution.executor import ExecutorError
from npeff.execution.ray.authentication import Authentication

_ENTRYPOINT = "python -m npeff run /dev/stdin <<'END_OF_RUN_FILE'\n{run_yaml}\nEND_OF_RUN_FILE"
"""The shell command of a job. It contains the run file, so it does not depend on the working directory."""

_STOP_WAIT_S = 30
"""Time in seconds that a stopped job has to end before Ray kills it. Ray's default is 3 s."""
_END_WAIT_S = 15.0
"""Timeout in seconds for the final state of a job after the end of its log."""
_START_WAIT_S = 60.0
"""Timeout in seconds for a newly started head node to accept jobs."""
_ANSWER_S = 20.0
"""Timeout in seconds for the answer to a request."""
_TELL_AFTER_S = 5.0
"""Time in seconds after which a line tells that an answer is waited for."""
_SILENT_S = 30.0
"""Time in seconds without a new line of a job's log after which a line tells the state of the job."""
_NOT_READY, _TAKEN, _UNKNOWN = "No available agent", "already exists", "does not exist"
"""Texts in the plain RuntimeError of Ray's client, which has no exception classes for these answers of the server."""
_LOOK_EVERY_S = 0.2
_LOGGERS = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers of Ray's client, which tell of uploads and of the connection of a log."""


@dataclass(frozen=True)
class Submission:
    """A run to be submitted."""

    run_dir: str
    """The run directory on the cluster: an absolute path or a URI."""
    run_yaml: str
    """The run file with all defaults, and with the names of environment variables."""
    written_run_dir: str = ""
    """The text ``run_dir`` of the run file, where it may differ from the directory: with names of variables."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job. Ray shows them in the job's runtime environment and writes them to its logs."""
    pip: tuple[str, ...] = ()
    py_modules: tuple[Path, ...] = ()
    """Packages to upload, such as the one that defines the task."""
    working_dir: str | None = None
    """Working directory of the job: a local folder or the URI of a zip file. An empty folder if None."""
    resources: dict[str, Any] = field(default_factory=dict)
    """Resources of the entry point, under Ray's names (``entrypoint_num_cpus`` and so on)."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.run_yaml.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Job:
    """The state of a job."""

    id: str
    state: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    since: float
    """When the job ended, or, if it has not ended, when it was submitted. In seconds since 1970."""
    exit_code: int | None
    message: str
    digest: str
    """`Submission.digest` of the run file that the job was submitted with."""

    @property
    def has_ended(self) -> bool:
        return self.state in ("SUCCEEDED", "STOPPED", "FAILED")


def in_job() -> bool:
    """Whether this process was started by a Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def job_prefix(run_dir: str, written: str = "") -> str:
    """Return the prefix of the id of a run's job.

    Args:
        run_dir: The run directory.
        written: `Submission.written_run_dir`.
    """
    name = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(written or run_dir).name).strip("-")[:40] or "run"
    return f"npeff-{name}-{_directory_hash(run_dir)}"


def _directory_hash(run_dir: str) -> str:
    return hashlib.sha256(run_dir.rstrip("/").encode()).hexdigest()[:8]


class JobServer:
    """A cluster's job server.

    Args:
        address: ``http://HEAD:8265``.

    Raises:
        ExecutorError: the job server cannot be reached or refuses access. All methods raise it if the server is lost.
    """

    def __init__(self, address: str) -> None:
        if _has_token() and (found := Authentication.current()).mode is None:
            replace(found, mode="token").use()  # Ray's clients send the token only in this mode
        from ray.exceptions import RayError
        from ray.job_submission import JobSubmissionClient

        for name in _LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        try:
            self._client = _client(JobSubmissionClient, address)
        except (OSError, RuntimeError, ValueError, ImportError, RayError) as error:
            raise ExecutorError(
                f"cannot reach the job server at {address} ({_reason(error)}): check that Ray runs there (`ray start "
                "--head`), and that this machine has the authentication token of the cluster"
            ) from None

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        """Submit a run, unless a job of the run is still pending or running.

        Returns:
            The job of the run, and whether it is new.

        Raises:
            ExecutorError: the cluster refuses the job, or the current job of the run uses another run file.
        """
        prefix = job_prefix(submission.run_dir, submission.written_run_dir)
        until, told = time.monotonic() + _START_WAIT_S, False
        while True:
            last = self.latest(submission.run_dir)
            if last is not None and not last.has_ended:
                if last.digest != submission.digest:
                    raise ExecutorError(
                        f"job {last.id} of {submission.run_dir} is still active and has another run file: wait until "
                        f"it ends, or stop it (npeff submit --stop {last.id} --address {self.address}); then submit "
                        "again"
                    )
                return last, False
            number = 1 if last is None else _number(last.id, submission.run_dir) + 1
            try:
                self._send(submission, f"{prefix}-{number}")
            except (OSError, RuntimeError, ValueError) as error:
                if _TAKEN in str(error):  # another process submitted the run at the same time
                    continue
                if _NOT_READY in str(error) and time.monotonic() < until:
                    if not told:
                        told = True
                        tell(f"waiting for {self.address} to accept jobs, at most {_START_WAIT_S:.0f} s")
                    time.sleep(_LOOK_EVERY_S)
                    continue
                if _NOT_READY in str(error) or isinstance(error, TimeoutError):
                    raise ExecutorError(
                        f"no job agent of the cluster at {self.address} accepts the job ({_reason(error)}): check the "
                        "head node (dashboard_agent.log in /tmp/ray/session_latest/logs), restart Ray there if it "
                        "hangs, and submit again"
                    ) from None
                raise ExecutorError(
                    f"the job server at {self.address} refused the job ({_reason(error)}): correct the options of "
                    "npeff submit and submit again"
                ) from None
            return self.job(f"{prefix}-{number}"), True

    def latest(self, run_dir: str) -> Job | None:
        """Return the last job of a run on this cluster, or None."""
        with self._asking():
            found = [details for details in self._client.list_jobs() if _number(details.submission_id, run_dir)]
        return _job(max(found, key=lambda details: _number(details.submission_id, run_dir))) if found else None

    def job(self, job_id: str) -> Job:
        """Return the state of a job."""
        with self._asking():
            return _job(self._client.get_job_info(job_id))

    def last_line(self, job_id: str) -> str:
        """Return the last line of a job's log that is not blank."""
        with self._asking():
            lines = self._client.get_job_logs(job_id).split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def follow(self, job_id: str, say: Callable[[str], None]) -> Job:
        """Pass the job's log to ``say`` from its beginning, until the job ends. Returns the ended job.

        The agent that sends the log may hang. If no line comes for a while, the server is asked for the job's state.
        """
        with self._asking():
            asyncio.run(self._pass_log(job_id, say))
        return self._ended(job_id, _END_WAIT_S)

    async def _pass_log(self, job_id: str, say: Callable[[str], None]) -> None:
        log, silent_s = aiter(self._client.tail_job_logs(job_id)), 0.0
        coming = asyncio.ensure_future(anext(log, None))
        while True:
            if not (await asyncio.wait([coming], timeout=_SILENT_S))[0]:
                silent_s += _SILENT_S
                job = self.job(job_id)
                why = f" ({job.message})" if job.state == "PENDING" and job.message else ""
                tell(f"no new line of the log of {job_id} for {silent_s:.0f} s; the job is {job.state}{why}")
                if job.has_ended:
                    return
            elif (lines := coming.result()) is None:
                return
            else:
                say(lines)
                coming, silent_s = asyncio.ensure_future(anext(log, None)), 0.0

    def stop(self, job_id: str) -> Job:
        """Stop a job as Ctrl-C stops a command, and wait for its end. Finished results are kept."""
        with self._asking():
            self._client.stop_job(job_id)
        return self._ended(job_id, _STOP_WAIT_S + _END_WAIT_S)

    def _send(self, submission: Submission, job_id: str) -> None:
        package = Path(__file__).parents[1]  # the cluster runs the version of the package that submits the job
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
                metadata={
                    "npeff_run_dir": submission.written_run_dir or submission.run_dir,
                    "npeff_run_file": submission.digest,
                },
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
        from ray.exceptions import RayError

        try:
            yield
        except (OSError, RuntimeError, aiohttp.ClientError, RayError) as error:
            if _UNKNOWN in str(error):
                raise ExecutorError(
                    f"the job server at {self.address} has no such job ({_reason(error)}): give the id of another job, "
                    "or a run file"
                ) from None
            raise ExecutorError(
                f"the connection to the job server at {self.address} was lost ({_reason(error)}); finished work is "
                "kept: submit the run again when the cluster is available, to follow the job or to resume the run"
            ) from None


def _client(kind: type, address: str) -> Any:
    """Return a client whose requests end with an error if the server does not answer. Those of Ray wait for ever."""

    class Impatient(kind):  # type: ignore[misc]
        def _do_request(self, *arguments: Any, **options: Any) -> Any:
            from requests import Timeout

            line = f"waiting for the job server at {address} to answer, at most {_ANSWER_S:.0f} s"
            teller = threading.Timer(_TELL_AFTER_S, tell, [line])
            teller.start()
            try:
                return super()._do_request(*arguments, **{"timeout": _ANSWER_S} | options)
            except Timeout:
                raise TimeoutError(f"no answer within {_ANSWER_S:.0f} s") from None
            finally:
                teller.cancel()

    return Impatient(address)


def _job(details: Any) -> Job:
    milliseconds = details.end_time or details.start_time or 0
    code = details.driver_exit_code
    return Job(
        id=details.submission_id,
        state=str(details.status),
        since=milliseconds / 1000,
        exit_code=code if code is None or code >= 0 else 128 - code,  # killed by a signal: the exit code of a shell
        message=details.message or "",
        digest=(details.metadata or {}).get("npeff_run_file", ""),
    )


def _number(job_id: str | None, run_dir: str) -> int:
    """Return the number of a job of the run, or 0 for a job of another run."""
    found = re.fullmatch(rf"npeff-.+-{_directory_hash(run_dir)}-(\d+)", job_id or "")
    return int(found[1]) if found else 0


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


def _reason(error: Exception) -> str:
    """Return the line of an error that states its cause: the last line of a traceback, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[-1] if "Traceback" in lines[0] else lines[0]
