"""Mistakes in `npeff submit` and `npeff status` end in one line and exit code 2, before any cluster is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from end_to_end.local_head import write_run_file
from npeff.cli import job_commands
from npeff.cli import main as cli
from npeff.execution.ray.jobs import job_prefix


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("npeff: error: ")
    assert shown.err.count("\n") == 1
    return shown.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--env", "1A=2"], "--env 1A=2: give NAME=VALUE"),
        (["--env", "NPEFF_NOT_SET"], "--env NPEFF_NOT_SET: the variable is not set on this machine; give NPEFF_"),
        (["--pip", "no-such.txt"], "--pip no-such.txt: cannot read the file (No such file or directory)"),
        (["--working-dir", "no-such-folder"], "--working-dir no-such-folder: the folder does not exist"),
        (["--py-module", "no-such-package"], "no-such-package"),
        (["--entrypoint-resources", "head=1"], '--entrypoint-resources head=1: give JSON such as {"head": 1}'),
        (["--entrypoint-resources", '["head"]'], "give JSON such as"),
        (["--entrypoint-num-cpus", "-1"], "greater than or equal to 0"),
        (["--stop", "npeff-run-1"], "give a run file, or --stop JOB"),
    ],
)
def test_a_mistake_is_one_line(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in fails(capsys, "submit", write_run_file(tmp_path), *options, "--address", "http://127.0.0.1:1")


def test_nothing_to_submit_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a run file, or --stop JOB" in fails(capsys, "submit")


def test_the_status_of_nothing_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no run in" in fails(capsys, "status", tmp_path)


def test_requirements_come_from_a_file_too(tmp_path: Path) -> None:
    file = tmp_path / "requirements.txt"
    file.write_text("# what it needs\ntimm==1.0.20  # models\n\neinops\n")
    assert job_commands._requirements(str(file)) == ["timm==1.0.20", "einops"]
    assert job_commands._requirements("timm==1.0.20") == ["timm==1.0.20"]


def test_a_runs_jobs_have_one_name_and_other_runs_have_others() -> None:
    assert job_prefix("/data/runs/sst2") == job_prefix("/data/runs/sst2/")
    assert job_prefix("/data/runs/sst2").startswith("npeff-sst2-")
    assert job_prefix("s3://bucket/runs/sst2").startswith("npeff-sst2-")
    assert len({job_prefix(path) for path in ("/a/run", "/b/run", "s3://a/run")}) == 3
    assert job_prefix("/data/my run.v2").startswith("npeff-my-run-v2-")
