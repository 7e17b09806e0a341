"""A process that is told to end while it imports its modules says one line."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_imports_is_one_line(tmp_path: Path, number: int) -> None:
    # a module that the command imports, which says when it is imported and takes long
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    source = "import sys; sys.path.insert(0, sys.argv.pop(1)); from npeff.cli.entry import command; command()"
    process = subprocess.Popen(
        [sys.executable, "-c", source, str(tmp_path), "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "npeff: interrupted; run the same command again to resume\n")
