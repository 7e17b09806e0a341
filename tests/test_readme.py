"""The task in the README runs, from its own folder, and can be asked."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.process
def test_the_example_of_an_own_task_runs_from_its_own_folder(tmp_path: Path) -> None:
    (source,) = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
        if "class MyTask(Task)" in block
    ]
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
        [sys.executable, "-m", "npeff", "run", "run.yaml"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/points/factorizations/default/report/index.html").exists()
    answer = subprocess.run(
        [
            sys.executable,
            "-m",
            "npeff",
            "query",
            "runs/points",
            "example",
            "-e",
            "point-7",
            "--format",
            "csv",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert answer.stdout.startswith('"component","coefficient"'), answer.stderr
