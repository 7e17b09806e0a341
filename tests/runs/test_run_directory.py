"""The run directory: created once, refused when it is another run's, locked, and honest about its stages."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory, StageState
from npeff.runs.errors import RunDirectoryError


def config(run_dir: Path, **changes: object) -> RunConfig:
    document = {"run_dir": str(run_dir), "task": {"name": "digits"}, "factorization": {"n_components": 4}}
    return RunConfig.model_validate(document | changes)


def test_a_new_run_writes_its_configuration_and_what_made_it(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path / "run", seed=7))
    assert RunDirectory.open(run.path).config == run.config
    assert "factorization" not in (run.path / "run.yaml").read_text()
    assert "n_components: 4" in (run.path / "factorizations" / "default" / "factorization.yaml").read_text()
    provenance = json.loads((run.path / "provenance.json").read_text())
    assert provenance["seed"] == 7
    assert provenance["packages"]["numpy"] != "not installed"


def test_the_same_configuration_is_taken_up_with_other_workers_too(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "run"))
    again = RunDirectory.create(config(tmp_path / "run", executor={"workers": 2}))
    assert again.config.executor.workers == 2


def test_another_configuration_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path / "run"))
    before = (run.path / "run.yaml").read_bytes()
    with pytest.raises(RunDirectoryError, match=r"it differs in seed\)"):
        RunDirectory.create(config(tmp_path / "run", seed=1, verification={"target_kl": 0.2}))
    assert (run.path / "run.yaml").read_bytes() == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(RunDirectoryError, match="not empty and holds no run"):
        RunDirectory.create(config(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex"]


def test_a_file_in_the_way_and_a_uri_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="cannot write to"):
        RunDirectory.create(config(tmp_path / "file" / "run"))
    with pytest.raises(RunDirectoryError, match="give a local path or a URI s3://bucket/prefix"):
        RunDirectory.create(config(tmp_path).model_copy(update={"run_dir": "gs://bucket/run"}))


def test_opening_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run in"):
        RunDirectory.open(tmp_path)


def test_a_moved_run_opens_where_it_is_now(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert RunDirectory.open(tmp_path / "new").config.run_dir == str(tmp_path / "new")


def test_a_stage_is_missing_then_partial_then_complete(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path / "run"))
    outputs = (run.fishers,)
    assert run.state("fishers", outputs) is StageState.MISSING
    run.fishers.mkdir()
    assert run.state("fishers", outputs) is StageState.MISSING
    (run.fishers / "zarr.json").write_text("{}")
    assert run.state("fishers", outputs) is StageState.PARTIAL
    run.complete("fishers", {"n_examples": 3})
    assert run.state("fishers", outputs) is StageState.COMPLETE
    assert (run.record("fishers") or {})["n_examples"] == 3


@pytest.mark.process
def test_a_run_in_use_is_refused_and_a_killed_owner_lets_go(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path / "run"))
    script = (
        "import sys, time; from npeff.runs.directory import RunDirectory\n"
        "with RunDirectory.open(sys.argv[1]).lock(): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(run.path)], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline().strip() == "held"
        with pytest.raises(RunDirectoryError, match=f"in use by another command \\(process {owner.pid} on"), run.lock():
            pass
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    deadline = time.monotonic() + 5
    while True:
        try:
            with run.lock():
                break
        except RunDirectoryError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
