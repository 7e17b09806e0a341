"""A run that is asked to stop, by Ctrl-C or by a cluster that takes its node back, says so and goes on later."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

RUN_FILE = """
run_dir: {run_dir}
task: {{name: digits, options: {{epochs: 1, train_examples: 100}}}}
fishers: {{shard_size: 8}}
factorization: {{n_components: 2}}
executor: {{kind: {kind}, workers: 1, cpus_per_worker: 2}}
"""


@pytest.mark.parametrize(
    ("asked", "kind"), [pytest.param(signal.SIGTERM, "ray", marks=pytest.mark.slow), (signal.SIGINT, "auto")]
)
def test_a_run_that_is_asked_to_stop_ends_with_one_line_and_keeps_what_is_finished(
    asked: signal.Signals, kind: str, tmp_path: Path
) -> None:
    run_dir, run_file = tmp_path / "run", tmp_path / "run.yaml"
    run_file.write_text(RUN_FILE.format(run_dir=run_dir, kind=kind))
    with subprocess.Popen(
        [sys.executable, "-m", "npeff", "fishers", str(run_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 200
        while not list(run_dir.glob("shards/*.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(asked)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, output + errors
    assert errors == "npeff: interrupted; run the same command again to resume\n"
    assert 1 <= len(list(run_dir.glob("shards/*.json"))) < 213
    assert not (run_dir / "stages" / "fishers.json").exists()
