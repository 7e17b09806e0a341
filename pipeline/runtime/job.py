"""Submit a run as a Ray job: the same command, on the cluster, its logs here."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime.executor import ExecutorError

_ENTRYPOINT = "python -m pipeline.cli run run.yaml"


def submit_job(
    run_yaml: str,
    address: str,
    *,
    py_modules: Sequence[Path] = (),
    follow: bool,
    say: Callable[[str], None],
) -> int:
    """Submit ``npeff run`` of a resolved run file; the job's exit code, or 0 at once when it is not followed.

    The run file and this package travel with the job, so that the cluster runs the version that submits; data and run
    directory are named by paths that the cluster can see.

    Args:
        address: of the cluster's job server, ``http://HEAD:8265``.
        py_modules: further Python packages to send along, such as the one that defines the task.
        say: is given the logs as they come.

    Raises:
        ExecutorError: there is no job server, or it does not let us in.
    """
    if _has_token():  # Ray's clients leave it at home unless they are told so
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.job_submission import JobSubmissionClient

    package = Path(__file__).parents[1]
    try:
        client = JobSubmissionClient(address)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "run.yaml").write_text(run_yaml, encoding="utf-8")
            job = client.submit_job(
                entrypoint=_ENTRYPOINT,
                runtime_env={
                    "working_dir": folder,
                    "py_modules": [str(path) for path in (package, *py_modules)],
                    "excludes": ["**/__pycache__"],
                },
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ExecutorError(
            f"cannot submit to {address} ({reason}): is `ray start --head` running there, "
            "and does this machine have the cluster's authentication token?"
        ) from None
    say(f"submitted {job} to {address}\n")
    if not follow:
        say(f"follow it: ray job logs --address {address} --follow {job}\n")
        return 0
    asyncio.run(_follow(client, job, say))
    info = client.get_job_info(job)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    say(f"{info.message or info.status}\n")
    return 0 if info.status == "SUCCEEDED" else 1


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").exists()


async def _follow(client: Any, job: str, say: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(job):
        say(lines)
