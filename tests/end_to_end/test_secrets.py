"""Values of environment variables in a run file: the task receives them, and nothing that is written contains them."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import npeff
import pytest
import yaml
from npeff.cli.main import main
from npeff.tasks import TaskError
from places import place

pytestmark = pytest.mark.process

TESTS = Path(__file__).parents[1]
TOKEN = "hf_QzX7w-between-us-4b1d"
DIGEST = hashlib.sha256(TOKEN.encode()).hexdigest()
OPTIONS = {"token": "${NPEFF_TEST_TOKEN}", "digest": DIGEST, "data": "${NPEFF_TEST_FOLDER}/points"}
FOLDER = "/no/such-folder-of-mine"


def write_run_file(folder: Path, options: dict[str, str] = OPTIONS, **changes: Any) -> Path:
    document = {
        "run_dir": str(folder / "run"),
        "task": {"name": "token_task:TokenTask", "options": options},
        "fishers": {"sketch": {"kind": "identity"}, "shard_size": 16},
        "factorization": {"n_components": 3, "n_starts": 1, "max_iterations": 4, "stability_examples": 0},
        "verification": {"top_examples": 4, "baseline_examples": 8},
        "executor": {"kind": "serial"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(document | changes, sort_keys=False))
    return path


def files_with(value: str, folder: Path) -> list[str]:
    """The files in a folder whose name or content contains a value."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if value in path.name or value.encode() in path.read_bytes()]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPEFF_TEST_TOKEN", TOKEN)
    monkeypatch.setenv("NPEFF_TEST_FOLDER", FOLDER)


Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """The command in this process: exit code and output."""
    handler, path = signal.getsignal(signal.SIGTERM), list(sys.path)

    def run(*arguments: object) -> tuple[int, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        shown = capfd.readouterr()
        assert TOKEN not in shown.out + shown.err
        return int(ended.value.code or 0), shown.out + shown.err

    yield run
    signal.signal(signal.SIGTERM, handler)
    sys.path[:] = path


def refused(command: Command, *arguments: object) -> str:
    code, shown = command(*arguments)
    lines = [line for line in shown.splitlines() if line.startswith("npeff: error: ")]
    assert (code, len(lines), "Traceback" in shown) == (2, 1, False), shown
    return lines[0].removeprefix("npeff: error: ")


@pytest.mark.usefixtures("variables")
def test_a_run_holds_names_and_only_what_needs_a_value_asks_for_it(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NPEFF_TEST_PLACE", str(tmp_path / "a-place-of-mine"))
    path, run_dir = write_run_file(tmp_path, run_dir="${NPEFF_TEST_PLACE}/run"), tmp_path / "a-place-of-mine" / "run"
    code, shown = command("run", path)
    assert code == 0, shown
    for value in (TOKEN, FOLDER, "a-place-of-mine"):
        assert files_with(value, run_dir) == []
    assert "token: ${NPEFF_TEST_TOKEN}" in (run_dir / "run.yaml").read_text()
    assert "token: ${NPEFF_TEST_TOKEN}" in (run_dir / place("report/index.html")).read_text()

    monkeypatch.delenv("NPEFF_TEST_TOKEN")
    monkeypatch.delenv("NPEFF_TEST_FOLDER")
    for words in (
        ("status", run_dir),
        ("status", path),
        ("query", run_dir, "components"),
        ("report", run_dir),
        ("check", run_dir),
        ("run", run_dir),
        ("run", path),
    ):
        code, shown = command(*words)
        assert code == 0, shown
    (run_dir / place("stages/verify.json")).unlink()
    shutil.rmtree(run_dir / place("partial/verify"))
    said = "task.options.token needs the environment variable NPEFF_TEST_TOKEN, which is not set on "
    for target in (run_dir, path):
        assert refused(command, "verify", target).startswith(said)
    monkeypatch.setenv("NPEFF_TEST_TOKEN", TOKEN)
    assert refused(command, "verify", run_dir).startswith("task.options.data needs the environment variable NPEFF_TEST")
    monkeypatch.setenv("NPEFF_TEST_FOLDER", FOLDER)
    assert command("verify", run_dir)[0] == 0
    assert files_with(TOKEN, run_dir) == []


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"fails": "prepare"}, "the server refuses '${NPEFF_TEST_TOKEN}': give another"),
        ({"fails": "model"}, "'${NPEFF_TEST_FOLDER}/points/${NPEFF_TEST_TOKEN}' (token_task.py, line "),
        ({"fails": "long"}, "raised RuntimeError: xxx"),
        ({"fails": "chain"}, "the weights are missing"),
        ({"digest": "another"}, "TokenTask() raised ValueError: this is not the token: ${NPEFF_TEST_TOKEN}"),
    ],
)
def test_an_error_of_the_task_shows_names(
    options: dict[str, str], said: str, command: Command, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_run_file(tmp_path, {**OPTIONS, **options})
    shown = refused(command, "fishers", path)
    assert said in shown
    assert TOKEN[:8] not in shown
    with pytest.raises(TaskError) as caught:
        npeff.compute_fishers(npeff.RunDirectory.open(tmp_path / "run"))
    assert caught.value.__cause__ is None, "an exception with the value is not a cause"


@pytest.mark.usefixtures("variables")
def test_an_error_before_the_run_begins_shows_names(command: Command, tmp_path: Path) -> None:
    shown = refused(command, "fishers", write_run_file(tmp_path, {**OPTIONS, "${NPEFF_TEST_TOKEN}": "3"}))
    assert "does not take task.options.${NPEFF_TEST_TOKEN} (" in shown
    assert TOKEN[:8] not in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("variables")
def test_an_error_of_a_path_of_the_command_shows_its_name(command: Command, tmp_path: Path) -> None:
    factorization = {"n_components": 3, "start_from": "${NPEFF_TEST_FOLDER}/other"}
    path = write_run_file(tmp_path, factorization=factorization)
    assert command("fishers", path)[0] == 0
    assert "no run in ${NPEFF_TEST_FOLDER}/other (" in refused(command, "factorize", path)


@dataclass(frozen=True)
class RayCommand:
    """``npeff run`` with Ray actors, in a process of its own, and the folder of Ray's logs."""

    folder: Path
    logs: Path

    def __call__(self, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(self.logs),
            "NPEFF_TEST_FOLDER": FOLDER,
            **variables,
        }
        path = write_run_file(self.folder, executor={"kind": "ray"})
        command = [sys.executable, "-m", "npeff", "run", str(path)]
        seen = set[str]()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(
                subprocess.run, command, env=environment, capture_output=True, text=True, timeout=240, check=False
            )
            while not running.done():  # the folder is removed when Ray ends
                with suppress(OSError):  # files that are removed meanwhile
                    logs = [path for path in self.logs.rglob("*") if path.is_file() and path.stat().st_size]
                    assert not any(value.encode() in path.read_bytes() for path in logs for value in (TOKEN, FOLDER))
                    seen |= {path.name for path in logs}
                time.sleep(0.2)
        done: subprocess.CompletedProcess[str] = running.result()
        assert "raylet.out" in seen, "these are Ray's logs"
        assert TOKEN not in done.stdout + done.stderr
        assert files_with(TOKEN, self.folder / "run") == files_with(FOLDER, self.folder / "run") == []
        return done


@pytest.fixture
def ray_command(tmp_path: Path) -> Iterator[RayCommand]:
    logs = Path(tempfile.mkdtemp(prefix="npeff-ray-"))  # a test's own folder has too long a name for sockets
    yield RayCommand(tmp_path, logs)
    shutil.rmtree(logs, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow  # test_jobs.py has the same for the workers of a job
def test_ray_actors_receive_the_value_and_ray_writes_it_nowhere(ray_command: RayCommand) -> None:
    done = ray_command(NPEFF_TEST_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "task.options.token needs the environment variable NPEFF_TEST_TOKEN, which is not set on "),
        (
            {"NPEFF_TEST_TOKEN": f"another-{TOKEN}"},
            "TokenTask() raised ValueError: this is not the token: ${NPEFF_TEST_TOKEN}",
        ),
    ],
)
def test_an_error_inside_a_ray_actor_shows_names(variables: dict[str, str], said: str, ray_command: RayCommand) -> None:
    refused = ray_command(**variables)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
    assert said in refused.stderr
