"""The run directory: created once, refused when it is another run's, locked, and honest about its stages."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from npeff.runs import lock
from npeff.runs.config import RunConfig
from npeff.runs.directory import RunDirectory, StageState
from npeff.runs.errors import RunDirectoryError
from npeff.variables import VariableError


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


def test_the_stored_run_file_is_a_run_file(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path / "run", lift={"dtype": "float16"}))
    read = RunConfig.from_yaml(run.path / "run.yaml")
    assert read == run.config
    assert RunDirectory.create(read).path == run.path


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
        RunDirectory.create(config(tmp_path).model_copy(update={"run_dir": "ftp://bucket/run"}))


def test_opening_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run in"):
        RunDirectory.open(tmp_path)


def test_a_moved_run_opens_where_it_is_now(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    assert RunDirectory.open(tmp_path / "new").config.run_dir == str(tmp_path / "new")


TOKEN = "hf_between-us"


def with_token(run_dir: Path | str, token: str = "${TOKEN}", **changes: object) -> RunConfig:
    return config(run_dir, task={"name": "digits", "options": {"token": token}}, **changes)  # type: ignore[arg-type]


def test_a_run_stores_names_of_variables_and_opens_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE", str(tmp_path / "a-place"))
    run = RunDirectory.create(with_token("${PLACE}/run"))
    assert run.path == tmp_path / "a-place" / "run"
    stored = "".join(path.read_text() for path in run.path.rglob("*") if path.is_file())
    assert "run_dir: ${PLACE}/run\n" in stored
    assert "a-place" not in stored
    monkeypatch.delenv("PLACE")
    opened = RunDirectory.open(run.path)
    assert opened.config.run_dir == str(run.path)
    with RunDirectory.create(opened.config.with_max_iterations(200)).lock():
        pass  # writes the changed settings
    stored = "".join(path.read_text() for path in run.path.rglob("*.yaml"))
    assert "a-place" not in stored, "the text stays when the file is written again"
    assert RunDirectory.open(run.path).config.factorization.max_iterations == 200


def test_a_run_that_has_stored_a_value_goes_on_with_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = RunDirectory.create(with_token(tmp_path / "run", TOKEN))
    monkeypatch.setenv("TOKEN", TOKEN)
    again = RunDirectory.create(with_token(tmp_path / "run"))
    assert again.config.signature("task") == earlier.config.signature("task")
    monkeypatch.setenv("TOKEN", "another")
    with pytest.raises(RunDirectoryError, match=r"differs in task\.options\.token"):
        RunDirectory.create(with_token(tmp_path / "run"))
    monkeypatch.delenv("TOKEN")
    with pytest.raises(VariableError, match=r"task\.options\.token needs the environment variable TOKEN"):
        RunDirectory.create(with_token(tmp_path / "run"))


def test_a_run_that_has_stored_a_name_takes_any_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in (TOKEN, "another"):
        monkeypatch.setenv("TOKEN", token)
        assert RunDirectory.create(with_token(tmp_path / "run")).config.task.options == {"token": "${TOKEN}"}
    with pytest.raises(RunDirectoryError, match=r"differs in task\.options\.token"):
        RunDirectory.create(with_token(tmp_path / "run", TOKEN))


def test_a_path_with_the_syntax_of_a_variable_is_a_path(tmp_path: Path) -> None:
    odd = tmp_path / "${NOT_A_VARIABLE}"
    RunDirectory.create(config(tmp_path / "run"))
    (tmp_path / "run").rename(odd)
    opened = RunDirectory.open(odd)
    assert RunDirectory.create(opened.config.with_max_iterations(200)).path == odd


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


def test_waiting_for_workers_of_an_earlier_command_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lock, "_TELL_AFTER_S", 0.05)
    monkeypatch.setattr(lock, "_WORKERS_END_S", 0.3)
    with open(tmp_path / lock.LEASE, "w") as lease:
        fcntl.flock(lease, fcntl.LOCK_SH)
        refused = pytest.raises(RunDirectoryError, match="workers of an earlier command are still running")
        with refused, lock.run_lock(tmp_path):
            raise AssertionError
    told = capfd.readouterr().err
    assert told == f"waiting for the workers of an earlier command on {tmp_path} to end, at most 0 s\n"
