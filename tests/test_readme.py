"""What the README says is what happens: its run files are valid, its task runs, its commands and files exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.config import RunConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_run_files_are_valid(text: str) -> None:
    RunConfig.model_validate(yaml.safe_load(text))


def test_links_and_run_files_exist() -> None:
    named = re.findall(r"\]\((docs/[^)]+)\)", README) + re.findall(r"\b(jobs/\w+\.(?:yaml|py))", README)
    assert len(named) >= 4
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_commands_exist() -> None:
    commands = set(
        re.findall(
            r"npeff (run|fishers|select|factorize|lift|verify|repair|report|status|submit|query|estimate|import|"
            r"export)\b",
            README,
        )
    )
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert {command for command in commands if not re.search(rf"^  {command}\b", shown, re.MULTILINE)} == set()
    assert len(commands) == 14


def test_the_example_of_an_own_task_runs_from_its_own_folder(tmp_path: Path) -> None:
    (source,) = [block for block in blocks("python") if "class MyTask(Task)" in block]
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "my_task.py").write_text(source)
    document = {
        "run_dir": "runs/points",
        "task": {"name": "my_package.my_task:MyTask", "options": {"width": 8}},
        "fishers": {"sketch": {"kind": "identity"}},
        "factorization": {"n_components": 3},
        "executor": {"kind": "serial"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "run", "run.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/points/report/index.html").exists()
    answer = subprocess.run(
        [sys.executable, "-m", "pipeline.cli", "query", "runs/points", "example", "-e", "point-7", "--format", "csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.stdout.startswith('"component","coefficient"'), answer.stderr
