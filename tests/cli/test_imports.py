"""Commands that only read import nothing that takes seconds: each runs in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

HEAVY = {"torch", "transformers", "scipy", "sklearn", "dask", "ray", "zarr", "pandas", "matplotlib", "sympy"}

SCRIPT = """
import sys
from npeff.cli.main import command
try:
    command()
except SystemExit as ended:
    assert not ended.code, ended.code
print("imported", *(name for name in {heavy!r} if sys.modules.get(name) is not None), file=sys.stderr)
"""


def run_command(*arguments: object, **environment: str) -> tuple[str, set[str]]:
    """What a command prints, and the heavy packages that it has imported."""
    command = [sys.executable, "-c", SCRIPT.format(heavy=sorted(HEAVY)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout, set(done.stderr.splitlines()[-1].split()[1:])


def imported(*arguments: object) -> set[str]:
    return run_command(*arguments)[1]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["query", "--help"], ["fishers", "--help"]])
def test_help_imports_no_library_of_numbers(arguments: list[str]) -> None:
    assert imported(*arguments) == set()


@pytest.mark.parametrize(("words", "completed"), [("npeff sta", "status"), ("npeff query RUN enr", "enriched")])
def test_shell_completion_imports_no_library_of_numbers(words: str, completed: str) -> None:
    # what bash sets; `--show-completion` itself depends on the shell that runs the tests
    position = str(len(words.split()) - 1)
    printed, packages = run_command(_NPEFF_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=position)
    assert printed.split() == [completed]
    assert packages == set()


def test_status_imports_no_library_of_numbers(tmp_path: Path) -> None:
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text("run_dir: run\ntask: {name: digits}\nfactorization: {n_components: 3}\n", encoding="utf-8")
    assert imported("status", tmp_path) == set()


@pytest.mark.parametrize(
    "question",
    [
        ["top", "--component", "3"],
        ["top", "--component", "3", "--where", "not correct"],
        *(
            pytest.param(question, id=question[0], marks=pytest.mark.slow)
            for question in (["components"], ["energy", "--component", "3"], ["verification", "--component", "3"])
        ),
        ["sql", "select count(*) from examples"],
    ],
    ids=" ".join,
)
def test_answers_from_tables_import_no_library_of_arrays(run, question: list[str]) -> None:
    assert imported("query", run.path, *question) == set()


def test_other_questions_import_what_their_answer_needs(run) -> None:
    assert imported("query", run.path, "similar", "--component", "3") == {"zarr"}
    assert imported("query", run.path, "example", "--example", "0") == {"zarr"}
    assert imported("query", run.path, "enriched", "--where", "not correct") == {"scipy"}


@pytest.mark.slow
def test_fishers_import_no_library_that_they_do_not_need(tmp_path: Path) -> None:
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(
        f"run_dir: {tmp_path / 'run'}\ntask: {{name: digits, options: {{limit: 20, epochs: 1}}}}\n"
        "factorization: {n_components: 3}\n",
        encoding="utf-8",
    )
    assert not imported("fishers", run_yaml) & {"sympy", "sklearn", "transformers", "ray", "matplotlib"}
