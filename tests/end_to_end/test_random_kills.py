"""A run that is killed at random moments, in any stage, and a driver that stands still until its lock is stale."""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from end_to_end.commands import Command
from end_to_end.run_contents import CONFIG, STAGES, differences, units_done
from npeff.storage import object_lock
from object_store import ObjectStore
from places import place

pytestmark = [pytest.mark.process, pytest.mark.slow, pytest.mark.timeout(1800)]

N_KILLS = 20
SERIAL = {**CONFIG, "executor": {"kind": "serial"}}
"""The small run without Ray, whose own kills `kills.py` has."""
MORE_STEPS = {**CONFIG["factorization"], "max_iterations": 200}
"""Without them, the solver takes a tenth of the run."""


def written(folder: Path, **sections: object) -> Path:
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump({**SERIAL, **sections}), encoding="utf-8")
    return run_file


def stage_at_work(run: Path) -> str:
    """The first stage that is not complete."""
    return next((stage for stage in STAGES if not (run / place(f"stages/{stage}.json")).exists()), "later stages")


def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    run_file = written(tmp_path, factorization=MORE_STEPS)
    reference = tmp_path / "reference"
    with Command("run", run_file, "--run-dir", reference, log=tmp_path / "reference.log") as command:
        assert command.exit_code() == 0, command.output
        whole_s = time.monotonic() - command.began

    moments, killed, finished = random.Random(0), Counter[str](), 0
    while killed.total() < N_KILLS or not all(killed[stage] for stage in STAGES):
        run, log = tmp_path / f"run-{finished}", tmp_path / f"run-{finished}-{killed.total()}.log"
        before = {stage: units_done(run, stage) for stage in STAGES}
        with Command("run", run_file, "--run-dir", run, log=log) as command:
            time.sleep(moments.uniform(0.1, 1.2) * whole_s)
            command.driver.kill()
            code = command.exit_code()
        assert code in (0, -signal.SIGKILL), command.output
        for stage in ("fishers", "lift", "verify"):  # checkpoints of the solver are pruned
            assert before[stage].items() <= units_done(run, stage).items(), "a finished unit was written again"
        if code == 0:
            assert differences(run, reference) == []
            finished += 1
        else:
            killed[stage_at_work(run)] += 1
    run = tmp_path / f"run-{finished}"
    with Command("run", run_file, "--run-dir", run, log=tmp_path / "last.log") as command:
        assert command.exit_code() == 0, command.output
    assert differences(run, reference) == []
    print(f"{killed.total()} kills in {finished + 1} runs of {whole_s:.0f} s: {dict(killed)}")


def test_a_driver_that_stood_still_past_its_lock_writes_no_more(s3: ObjectStore, tmp_path: Path) -> None:
    run_dir = "s3://runs/team/stopped"
    run_file = written(tmp_path, run_dir=run_dir)
    with (
        Command("run", run_file, log=tmp_path / "first.log") as first,
        Command("run", run_file, "--run-dir", tmp_path / "local", log=tmp_path / "local.log") as local,
    ):
        first.wait_for(lambda: len(s3.contents(f"{run_dir}/shards")) >= 2, "2 shards were recorded")
        first.driver.send_signal(signal.SIGSTOP)
        s3.objects()["team/stopped/.lock"].last_modified -= timedelta(seconds=object_lock.STALE_S + 2)
        with Command("run", run_file, log=tmp_path / "second.log") as second:
            second.wait_for(lambda: len(s3.contents(f"{run_dir}/shards")) >= 5, "the second driver has the run")
            first.driver.send_signal(signal.SIGCONT)
            assert first.exit_code() == 2, first.output
            assert "another process" in first.output.splitlines()[-1]
            assert "Traceback" not in first.output
            assert second.exit_code() == 0, second.output
        assert local.exit_code() == 0, local.output
    mine = s3.contents(run_dir)
    for name in ("examples", "coefficients", "top_examples", "verification"):
        path = place(f"tables/{name}.parquet")
        assert mine[str(path)] == (tmp_path / "local" / path).read_bytes(), name
