"""``--debug`` shows the traceback of an error, which is otherwise one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_process import command, refused
from npeff.errors import hide_value_of

TASK = """
import os
from npeff.tasks import Task


class Mine(Task):
    def prepare(self, cache):
        self.helper()

    def helper(self):
        raise ValueError("my own mistake " + os.environ.get("NPEFF_TEST_HIDDEN", ""))

    model = examples = logits = None
"""


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "failing_task.py").write_text(TASK)
    path = tmp_path / "run.yaml"
    path.write_text(
        "run_dir: run\ntask: {name: 'failing_task:Mine'}\nfactorization: {n_components: 2}\nexecutor: {kind: serial}\n"
    )
    monkeypatch.chdir(tmp_path)
    yield path
    sys.modules.pop("failing_task", None)


@pytest.mark.parametrize("words", [("--debug", "fishers", "RUN"), ("fishers", "RUN", "--debug")], ids=" ".join)
def test_the_traceback_of_a_tasks_own_error_is_shown_on_demand(
    run_file: Path, words: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused(capfd, "fishers", run_file)
    assert "prepare() raised ValueError: my own mistake (failing_task.py, line 11)" in line
    assert command(*(run_file if word == "RUN" else word for word in words)) == 2
    *shown, last = capfd.readouterr().err.splitlines()
    assert last == line
    assert shown[0] == "Traceback (most recent call last):"
    assert f'  File "{run_file.parent}/failing_task.py", line 8, in prepare' in shown
    assert "ValueError: my own mistake " in shown


def test_a_traceback_shows_no_value_of_a_variable(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NPEFF_TEST_HIDDEN", "a-hidden-value")
    hide_value_of("NPEFF_TEST_HIDDEN")
    assert command("fishers", run_file, "--debug") == 2
    shown = capfd.readouterr().err
    assert "Traceback" in shown
    assert "a-hidden-value" not in shown


def test_the_option_is_not_taken_from_other_words(capfd: pytest.CaptureFixture[str]) -> None:
    assert "--debug" in refused(capfd, "status", "--", "--debug")
