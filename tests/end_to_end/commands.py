"""``npeff`` commands whose processes can be found, counted and killed.

Every command is started as the leader of a session of its own. Whatever it starts (a private Ray, its actors) stays in
that session even after the parent died, so the session's members are the command's processes, orphans included.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TESTS = str(Path(__file__).parents[1])
SLOW_TO_END = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Helpers of a Ray whose server was killed: they try for a minute to tell it, and then end. They never touch a run."""


@dataclass(frozen=True)
class Process:
    pid: int
    title: str
    """Its command line; Ray gives actors one that says what they do: ``ray::WorkerActor.call``."""

    @property
    def is_actor(self) -> bool:
        return self.title.startswith("ray::WorkerActor")

    @property
    def is_computing(self) -> bool:
        return self.title.startswith("ray::WorkerActor.call")

    @property
    def is_ray(self) -> bool:
        """The private Ray: its two servers, its helpers and all worker processes."""
        return "gcs_server" in self.title or "raylet" in self.title or "ray" in self.title.split(" ")[0]


def session_members(session: int) -> list[Process]:
    """All living processes of a session (zombies are dead)."""
    members = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            # the second field, the name in parentheses, may hold anything
            state, _, _, of_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(of_session) == session and state not in "ZX":
            members.append(Process(int(folder.name), title))
    return members


def send(processes: Iterable[Process], signal_number: int = signal.SIGKILL) -> None:
    for process in processes:
        try:
            os.kill(process.pid, signal_number)
        except ProcessLookupError:
            continue


class Command:
    """``npeff ARGUMENTS`` in a session of its own, its output in a file."""

    def __init__(self, *arguments: str | Path, log: Path) -> None:
        self._log = log
        self.began = time.monotonic()
        with log.open("wb") as stream:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "npeff", *map(str, arguments)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    @property
    def output(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def processes(self) -> list[Process]:
        return session_members(self.driver.pid)

    def actors(self) -> list[Process]:
        """Actors that are computing something; those that idle come after them."""
        return sorted((process for process in self.processes if process.is_actor), key=lambda p: not p.is_computing)

    def wait_for(self, condition: Callable[[], bool], what: str, deadline_s: float = 300.0) -> None:
        """Raises AssertionError when the command ends, or the deadline passes, before the condition holds."""
        until = time.monotonic() + deadline_s
        while not condition():
            ended = self.driver.poll()
            assert ended is None, f"the command ended ({ended}) before {what}:\n{self.output}"
            assert time.monotonic() < until, f"not within {deadline_s:.0f} s: {what}\n{self.output}"
            time.sleep(0.002)

    def exit_code(self, deadline_s: float = 300.0) -> int:
        return self.driver.wait(timeout=deadline_s)

    def seconds_until_nothing_is_left(self, deadline_s: float = 60.0, but: tuple[str, ...] = ()) -> float:
        """How long the command's processes, `but` for those with these titles, outlive the driver.

        Raises:
            AssertionError: some are there after the deadline; they are ended.
        """
        began = time.monotonic()
        while left := [process for process in self.processes if process.title not in but]:
            if time.monotonic() - began > deadline_s:
                send(left)
                raise AssertionError(f"left behind after {deadline_s:.0f} s: {[process.title for process in left]}")
            time.sleep(0.01)
        return time.monotonic() - began

    def close(self) -> None:
        """End whatever is left, as after a failed assertion."""
        if self.driver.poll() is None:
            self.driver.kill()
        send(self.processes)
        self.driver.wait()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def printed(module: str, *arguments: Path) -> dict[str, Any]:
    """What a script prints last, in a process of its own with a token of its own."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **token, "PYTHONPATH": os.pathsep.join([_TESTS, *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
