"""The ``npeff`` command in the process of the tests."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from npeff.cli.main import main


def command(*arguments: str | Path) -> int:
    """Run ``npeff ARGUMENTS`` and return its exit code. The handlers and the import path are as before afterwards."""
    handler, path = signal.getsignal(signal.SIGTERM), list(sys.path)
    try:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, handler)
        sys.path[:] = path
    return int(ended.value.code or 0)


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The line that a refused command prints."""
    code = command(*arguments)
    (line,) = capfd.readouterr().err.splitlines()
    assert code == 2, line
    return line
