"""``npeff demo``: the quickstart, which needs no file but the package's own."""

from __future__ import annotations

from pathlib import Path

from npeff.cli.app import app
from npeff.cli.options import RunDir
from npeff.cli.stage_commands import run_command

QUICKSTART = Path(__file__).with_name("quickstart.yaml")
"""The same run file as ``jobs/quickstart.yaml``."""


@app.command("demo")
def demo_command(run_dir: RunDir = None) -> None:
    """Train a small network on handwritten digits and explain it. Resumes after an interruption."""
    run_command(QUICKSTART, run_dir)
