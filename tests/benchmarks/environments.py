"""Environments of those that benchmarks compare with: the project's own has none of their packages."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def environment(folder: Path, requirements: Sequence[str], unwanted: Sequence[str] = ()) -> Path | None:
    """The Python of a virtual environment with these packages, made where it is missing; None if pip cannot make it.

    Args:
        unwanted: packages that the others bring along, to take away again.
    """
    python, made = (folder / "bin" / "python").absolute(), folder / "installed"
    if made.exists() and made.read_text() == "\n".join(requirements):
        return python
    commands = [
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", *requirements],
        [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted],
    ]
    for command in commands if unwanted else commands[:-1]:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"no environment with {requirements[0]}: {' '.join(command)} failed: {done.stderr.strip()[-300:]}")
            return None
    made.write_text("\n".join(requirements))
    return python
