"""The run as a Ray job, on a local `ray start --head`: plain `ray job submit`, `npeff submit`, one job per stage."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
STAGES = ("fishers", "factorize", "lift", "verify")


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]

    def command(self, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            arguments, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=200, check=False
        )


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head node of our own: on loopback, on ports of its own, with token authentication."""
    folder = tempfile.mkdtemp(prefix="npeff-ray-")  # a test's own folder has too long a name for Ray's sockets
    token = secrets.token_hex(16)
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_TMPDIR": folder,
    }
    port, dashboard, agent, client = free_ports(4)
    start = (
        f"ray start --head --block --num-cpus 2 --node-ip-address 127.0.0.1 --port {port} --dashboard-host 127.0.0.1 "
        f"--dashboard-port {dashboard} --dashboard-agent-listen-port {agent} --ray-client-server-port {client} "
        f"--disable-usage-stats --temp-dir {folder}"
    )
    log = Path(folder) / "head.log"
    with log.open("wb") as stream:
        head = subprocess.Popen(start.split(), env=environment, cwd=ROOT, stdout=stream, stderr=stream)
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{dashboard}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
        )
        deadline = time.monotonic() + 90
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert head.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
        yield Cluster(f"http://127.0.0.1:{dashboard}", environment)
    finally:
        head.send_signal(signal.SIGTERM)  # with --block it ends what it started
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def run_file(folder: Path, **changes: object) -> Path:
    document = {
        "run_dir": str(folder / "run"),
        "task": {"name": "digits", "options": {"limit": 90, "epochs": 3}},
        "fishers": {"sketch": {"dim": 128}, "shard_size": 30},
        "factorization": {"n_components": 4, "max_iterations": 4},
        "verification": {"top_examples": 5, "baseline_examples": 10},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document | changes))
    return path


def complete_stages(run: Path) -> set[str]:
    return {stage for stage in STAGES if (run / "stages" / f"{stage}.json").exists()}


def test_a_plain_ray_job_runs_everything_and_its_logs_follow(cluster: Cluster, tmp_path: Path) -> None:
    config = run_file(tmp_path)
    job = ("ray", "job", "submit", "--address", cluster.address, "--")
    done = cluster.command(*job, "python", "jobs/pipeline.py", "--config", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fishers: 3/3 shards" in done.stdout
    assert f"report: {tmp_path / 'run' / 'report' / 'index.html'}" in done.stdout
    assert complete_stages(tmp_path / "run") == set(STAGES)


def test_the_stages_are_jobs_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    config = run_file(tmp_path)
    commands = [f"python jobs/{stage}.py --config {config}" for stage in (*STAGES, "report")]
    job = ("ray", "job", "submit", "--address", cluster.address, "--")
    done = cluster.command(*job, "sh", "-c", " && ".join(commands))
    assert done.returncode == 0, done.stdout + done.stderr
    assert complete_stages(tmp_path / "run") == set(STAGES)
    assert (tmp_path / "run" / "report" / "index.html").exists()


def test_npeff_submit_runs_from_anywhere_follows_and_resumes_when_repeated(cluster: Cluster, tmp_path: Path) -> None:
    run_file(tmp_path, run_dir="relative/run")
    submit = ("npeff", "submit", "run.yaml", "--address", cluster.address)
    first = cluster.command(*submit, cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    run = tmp_path / "relative" / "run"
    assert complete_stages(run) == set(STAGES)
    before = {path: path.stat().st_mtime_ns for path in run.glob("stages/*.json")}
    again = cluster.command(*submit, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"report: {run / 'report' / 'index.html'}" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in run.glob("stages/*.json")} == before


def test_the_exit_code_is_the_runs_and_the_line_that_says_why_is_in_the_log(cluster: Cluster, tmp_path: Path) -> None:
    config = run_file(tmp_path, run_dir=str(tmp_path / "run.yaml" / "below-a-file"))
    failed = cluster.command("npeff", "submit", str(config), "--address", cluster.address)
    assert failed.returncode == 2
    assert "npeff: error: cannot write to" in failed.stdout
    assert "Traceback" not in failed.stdout + failed.stderr


def test_a_detached_submission_returns_at_once_and_can_be_followed(cluster: Cluster, tmp_path: Path) -> None:
    config = run_file(tmp_path, run_dir=str(tmp_path / "run.yaml" / "below-a-file"))
    sent = cluster.command("npeff", "submit", str(config), "--address", cluster.address, "--detach")
    assert sent.returncode == 0, sent.stderr
    follow = sent.stdout.splitlines()[-1].removeprefix("follow it: ")
    assert follow.startswith(f"ray job logs --address {cluster.address} --follow raysubmit_")
    logs = cluster.command(*follow.split())
    assert "npeff: error: " in logs.stdout


def test_a_server_that_does_not_answer_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    failed = cluster.command("npeff", "submit", str(run_file(tmp_path)), "--address", f"http://127.0.0.1:{port}")
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert f"cannot submit to http://127.0.0.1:{port}" in failed.stderr


def test_a_run_file_with_a_mistake_is_refused_before_anything_is_sent(cluster: Cluster, tmp_path: Path) -> None:
    config = run_file(tmp_path, factorisation={"n_components": 3})
    failed = cluster.command("npeff", "submit", str(config), "--address", cluster.address)
    assert failed.returncode == 2
    assert "unknown key 'factorisation' (did you mean 'factorization'?)" in failed.stderr
    assert "submitted" not in json.dumps(failed.stdout)
