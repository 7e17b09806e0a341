"""A Ray head of a test's own: on loopback, with ports and a token of its own; it can be killed and started again.

Whatever it starts are its descendants, and only those are ever killed: other clusters of the machine are left alone.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_NICENESS = "RAY_worker_niceness"  # the only variable of Ray that is passed on: 0 on a machine that is busy


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def write_run_file(folder: Path, **changes: object) -> Path:
    """A run of a few seconds, into ``folder/run`` unless the changes say otherwise."""
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


def _is_driver(title: str) -> bool:
    """Whether a command line is this project's command, and not the shell that runs it."""
    return "python" in title.split(" ")[0] and ("-m npeff " in title or "jobs/run.py " in title)


class LocalHead:
    """``ray start --head --block`` with two CPUs, ready for jobs as soon as it is constructed.

    Args:
        variables: environment variables of the cluster's machine, which commands that submit do not have.
    """

    def __init__(self, **variables: str) -> None:
        self._variables = variables
        self.folder = Path(tempfile.mkdtemp(prefix="npeff-ray-"))  # a test's own folder has too long a name for sockets
        self.token = secrets.token_hex(32)
        token_file = self.folder / "token"
        token_file.write_text(self.token)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_") or name == _NICENESS},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token_file),
            "OMP_NUM_THREADS": "1",
            "RAY_metrics_report_interval_ms": "500",
        }
        self._port, self._dashboard, self._agent, self._client, self.metrics_port = free_ports(5)
        self.address = f"http://127.0.0.1:{self._dashboard}"
        self.start()

    def start(self) -> None:
        """Start it, again with the same ports, and wait until it takes jobs."""
        start = (
            f"ray start --head --block --num-cpus 2 --node-ip-address 127.0.0.1 --port {self._port} "
            f"--dashboard-host 127.0.0.1 --dashboard-port {self._dashboard} "
            f"--dashboard-agent-listen-port {self._agent} "
            f"--ray-client-server-port {self._client} --metrics-export-port {self.metrics_port} "
            f"--disable-usage-stats --temp-dir {self.folder}"
        )
        log = self.folder / "head.log"
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                start.split(),
                env=self.environment | self._variables,
                cwd=ROOT,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )
        deadline = time.monotonic() + 90
        while not self._takes_jobs():
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def command(self, *arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            list(map(str, arguments)),
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    def get(self, path: str) -> bytes:
        """The dashboard's answer."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            print("HTTP", error.code, path, error.read().decode()[-1500:], flush=True)
            raise

    def processes(self, accept: Callable[[str], bool] = lambda title: True) -> list[psutil.Process]:
        """Its living descendants whose command line is accepted."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if process.status() != psutil.STATUS_ZOMBIE and accept(" ".join(process.cmdline())):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def drivers(self) -> list[psutil.Process]:
        """The drivers of jobs: this project's command, not the shell that it is run by."""
        return self.processes(_is_driver)

    def actors(self) -> list[psutil.Process]:
        """Workers of this project; those that are computing come first."""
        found = self.processes(lambda title: title.startswith("ray::WorkerActor"))
        return sorted(found, key=lambda process: "WorkerActor.call" not in " ".join(process.cmdline()))

    def kill(self) -> list[str]:
        """Its servers die at once, as on a machine that is lost, and then all that they started.

        Returns:
            Command lines of drivers and workers that had not ended by themselves within two minutes.
        """
        started = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                started[process] = " ".join(process.cmdline())
        servers = [process for process, title in started.items() if "gcs_server" in title or "raylet/raylet" in title]
        for process in [psutil.Process(self._process.pid), *servers]:
            process.kill()
        self._process.wait()
        works = [process for process, title in started.items() if _is_driver(title) or "ray::WorkerActor" in title]
        _, outlived = psutil.wait_procs(works, timeout=120)  # a driver is ended by the watcher that Ray gave it
        for process in started:  # Ray's helpers try for a minute to tell a server
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=30)
        return [started[process] for process in outlived]

    def close(self) -> None:
        if self._process.poll() is None:
            started = self.processes()
            self._process.send_signal(signal.SIGTERM)  # with --block it ends what it started
            self._process.wait(timeout=60)
            _, left = psutil.wait_procs(started, timeout=10)
            for process in left:
                process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> LocalHead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _takes_jobs(self) -> bool:
        try:
            self.get("/api/jobs/")
            socket.create_connection(("127.0.0.1", self._agent), timeout=5).close()  # jobs are handed on to it
        except (urllib.error.URLError, OSError):
            return False
        return True
