"""Mistakes in `npeff submit` and `npeff status` end in one line and exit code 2, before any cluster is asked."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from end_to_end.local_head import write_run_file
from npeff.cli import job_commands
from npeff.cli import main as cli
from npeff.execution.executor import ExecutorError
from npeff.execution.ray import jobs
from npeff.execution.ray.jobs import Job, Submission, job_prefix
from npeff.variables import resolved


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("npeff: error: ")
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--env", "1A=2"], "--env 1A=2: give NAME=VALUE"),
        (["--env", "NPEFF_NOT_SET"], "--env NPEFF_NOT_SET: the variable is not set on this machine; give NPEFF_"),
        (["--pip", "no-such.txt"], "--pip no-such.txt: cannot read the file (No such file or directory)"),
        (["--working-dir", "no-such-folder"], "--working-dir no-such-folder: the folder does not exist"),
        (["--py-module", "no-such-package"], "no-such-package"),
        (["--entrypoint-resources", "head=1"], '--entrypoint-resources head=1: give JSON such as {"head": 1}'),
        (["--entrypoint-resources", '["head"]'], "give JSON such as"),
        (["--entrypoint-num-cpus", "-1"], "greater than or equal to 0"),
        (["--stop", "npeff-run-1"], "give a run file, or --stop JOB"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(capsys, "submit", write_run_file(tmp_path), *options, "--address", "http://127.0.0.1:1")


def test_nothing_to_submit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a run file, or --stop JOB" in fails(capsys, "submit")


def test_the_status_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run in" in fails(capsys, "status", tmp_path)


def test_requirements_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# what it needs\ntimm==1.0.20  # models\n\neinops\n")
    assert job_commands._requirements(str(file)) == ["timm==1.0.20", "einops"]
    assert job_commands._requirements("timm==1.0.20") == ["timm==1.0.20"]


def test_a_runs_jobs_have_one_name_and_other_runs_have_others() -> None:
    assert job_prefix("/data/runs/sst2") == job_prefix("/data/runs/sst2/")
    assert job_prefix("/data/runs/sst2").startswith("npeff-sst2-")
    assert job_prefix("s3://bucket/runs/sst2").startswith("npeff-sst2-")
    assert len({job_prefix(path) for path in ("/a/run", "/b/run", "s3://a/run")}) == 3
    assert job_prefix("/data/my run.v2").startswith("npeff-my-run-v2-")


class _Server:
    """Keeps what would be sent."""

    sent: ClassVar[list[Submission]] = []

    def __init__(self, address: str) -> None:
        pass

    def submit(self, submission: Submission) -> tuple[Job, bool]:
        self.sent.append(submission)
        return Job("npeff-run-1", "PENDING", 0.0, None, "", submission.digest), True


def test_what_is_submitted_has_names_of_variables_and_no_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job_commands, "JobServer", _Server)
    monkeypatch.setattr(_Server, "sent", [])
    monkeypatch.setenv("PLACE", "a-place")
    monkeypatch.setenv("TOKEN", "hf_between-us")
    monkeypatch.chdir(tmp_path)
    task = {"name": "digits", "options": {"token": "${TOKEN}", "absent": "${NOT_SET_HERE}"}}
    path = write_run_file(tmp_path, run_dir="runs/${PLACE}", task=task)
    with pytest.raises(SystemExit) as ended:
        cli.main(["submit", str(path), "--detach"])
    assert not ended.value.code, capsys.readouterr().err
    (sent,) = _Server.sent
    assert sent.environment == {}
    assert (sent.run_dir, sent.written_run_dir) == (f"{tmp_path}/runs/a-place", f"{tmp_path}/runs/${{PLACE}}")
    assert "token: ${TOKEN}" in sent.run_yaml
    assert not any(value in sent.run_yaml + sent.written_run_dir for value in ("a-place", "hf_between-us"))
    prefix = job_prefix(sent.run_dir, sent.written_run_dir)
    assert prefix.startswith("npeff-PLACE-")
    assert prefix.rpartition("-")[2] == job_prefix(sent.run_dir).rpartition("-")[2], "the directory finds the job"


@pytest.mark.parametrize(
    ("run_dir", "value", "written"),
    [
        ("s3://${PLACE}/run/", "a-bucket", "s3://${PLACE}/run"),
        ("${PLACE}/run", "s3://a-bucket", "${PLACE}/run"),
        ("${PLACE}/run", "/data", "${PLACE}/run"),
        ("${PLACE}/run", "~/data", "${PLACE}/run"),
        ("${PLACE}/run", "data", "{here}/${PLACE}/run"),
        ("~/${PLACE}", "data", "{home}/${PLACE}"),
        ("/data/${PLACE}", "x", "/data/${PLACE}"),
    ],
)
def test_the_text_of_a_submitted_run_dir_leads_to_the_same_place(
    run_dir: str, value: str, written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", value)
    place = resolved(run_dir, "run_dir")
    found = job_commands._written_there(run_dir, place)
    assert found == written.replace("{here}", str(tmp_path)).replace("{home}", str(Path.home()))
    assert job_commands._there(resolved(found, "run_dir")) == job_commands._there(place)


def test_a_run_dir_whose_variable_is_not_set_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PLACE", raising=False)
    path = write_run_file(tmp_path, run_dir="s3://${PLACE}/run")
    for command in ("submit", "status"):
        assert "run_dir needs the environment variable PLACE, which is not set" in fails(capsys, command, path)


def test_a_package_of_the_task_that_is_not_uploaded_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_commands, "JobServer", _Server)
    path = write_run_file(tmp_path)
    path.write_text(re.sub(r"name: \S+", "name: my_package.my_task:MyTask", path.read_text(), count=1))
    (tmp_path / "my_package").mkdir()
    named = "the cluster must have the package my_package of the task: give --py-module"
    for options, is_named in (
        ([], True),
        (["--py-module", tmp_path / "my_package"], False),
        (["--working-dir", tmp_path], False),
        (["--working-dir", tmp_path / "my_package"], True),
    ):
        with pytest.raises(SystemExit):
            cli.main(["submit", str(path), "--detach", *map(str, options)])
        assert (named in capsys.readouterr().out) == is_named, options


@pytest.mark.process
def test_a_job_server_that_does_not_answer_is_told_and_then_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "_ANSWER_S", 0.5)
    monkeypatch.setattr(jobs, "_TELL_AFTER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts connections, and says nothing
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ExecutorError, match=rf"cannot reach the job server at {address} \(no answer within 0 s\)"):
            jobs.JobServer(address)
    assert capsys.readouterr().err == f"waiting for the job server at {address} to answer, at most 0 s\n"


class _Client:
    """Ray's client of a cluster with one job, whose agent hangs after some lines of the log."""

    def __init__(self, *states: str, refusal: Exception | None = None) -> None:
        self._states, self._refusal = list(states), refusal

    def list_jobs(self) -> list[SimpleNamespace]:
        return []

    def submit_job(self, **arguments: object) -> None:
        assert self._refusal is not None
        raise self._refusal

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        times = {"start_time": 1000, "end_time": None}
        message = "It may be waiting for resources." if state == "PENDING" else ""
        return SimpleNamespace(
            submission_id=job_id, status=state, driver_exit_code=0, message=message, metadata={}, **times
        )

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        yield "a line\n"
        yield "another\n"
        await asyncio.sleep(60)


def _server(client: _Client) -> jobs.JobServer:
    server = jobs.JobServer.__new__(jobs.JobServer)
    server.address, server._client = "http://head:8265", client
    return server


def test_a_log_that_stops_is_told_with_the_state_of_the_job_and_ends_with_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jobs, "_SILENT_S", 0.1)
    said: list[str] = []
    job = _server(_Client("PENDING", "RUNNING", "SUCCEEDED")).follow("npeff-run-1", said.append)
    assert said == ["a line\n", "another\n"]
    assert job.state == "SUCCEEDED"
    assert capsys.readouterr().err.splitlines() == [
        "no new line of the log of npeff-run-1 for 0 s; the job is PENDING (It may be waiting for resources.)",
        "no new line of the log of npeff-run-1 for 0 s; the job is RUNNING",
        "no new line of the log of npeff-run-1 for 0 s; the job is SUCCEEDED",
    ]


@pytest.mark.parametrize(
    "refusal", [TimeoutError("no answer within 20 s"), RuntimeError("No available agent to submit job")]
)
def test_a_job_agent_that_hangs_or_is_not_there_is_one_line_and_not_a_mistake_of_the_options(
    monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    monkeypatch.setattr(jobs, "_START_WAIT_S", 0.1)
    with pytest.raises(ExecutorError, match=rf"no job agent of the cluster at .*\({refusal}\): check") as error:
        _server(_Client("RUNNING", refusal=refusal)).submit(Submission("/data/run", "run_dir: /data/run"))
    assert "options" not in str(error.value)
    with pytest.raises(ExecutorError, match=r"refused the job \(no such package\): correct the options"):
        _server(_Client("RUNNING", refusal=RuntimeError("no such package"))).submit(Submission("/data/run", "a: b"))
