"""Finds tests that start processes, so that ``make check`` can leave them out.

A test that starts a process has the marker ``process``, or ``ray`` where it starts Ray itself. A test that starts a
process without a marker fails. With ``NPEFF_RECORD_PROCESSES=FILE`` no test fails; the file lists what they started.
"""

from __future__ import annotations

import json
import os
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

MARKERS = ("process", "ray")

_SHORT = {"git", "uname", "ldconfig", "ldd", "objdump", "gcc", "cc", "c++", "g++", "ld", "file", "lscpu"}
"""Programs that end at once, and that libraries ask about the machine."""

_current: pytest.Item | None = None


def install() -> None:
    """Watch every process that Python starts from here on."""
    sys.addaudithook(_on_event)
    start = BaseProcess.start

    def watched(process: BaseProcess) -> None:
        _started("multiprocessing")
        start(process)

    BaseProcess.start = watched  # type: ignore[method-assign]


def enter(item: pytest.Item | None) -> None:
    """The test that runs from here on."""
    global _current
    _current = item


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        _started(Path(os.fsdecode(arguments[0] or arguments[1][0])).name)
    elif event in ("os.fork", "os.posix_spawn"):
        _started(event)


def _started(program: str) -> None:
    if _current is None or program in _SHORT:
        return
    if (record := os.environ.get("NPEFF_RECORD_PROCESSES")) is not None:
        with open(record, "a", encoding="utf-8") as file:
            file.write(json.dumps([_current.nodeid, program]) + "\n")
    elif not any(_current.get_closest_marker(name) for name in MARKERS):
        raise AssertionError(
            f"{_current.nodeid} starts a process ({program}): give it the marker {' or '.join(MARKERS)}, or start none"
        )
