"""Whatever goes wrong, the command prints one line and ends with a code that says what it was."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from in_process import command, refused
from npeff.cli import main as entry
from npeff.errors import hide_value_of

SECRET = "a-value-that-is-secret"


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the application raise an error."""

    def make(error: BaseException) -> None:
        def app(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(entry, "_command_line", lambda: app)

    return make


def log_named(line: str) -> Path:
    return Path(line.rpartition("please report it with ")[2].removesuffix(")"))


@pytest.mark.parametrize(
    "error", [ValueError("no such\n thing"), KeyError("x"), RecursionError(), OSError(5000, "odd")]
)
def test_a_defect_is_one_line_with_a_log_and_code_70(
    fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: Exception
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fails(error)
    assert command("status", "x") == 70
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"npeff: error: {type(error).__name__}: ")
    log = log_named(line)
    assert log.parent == tmp_path
    assert log.stat().st_mode & 0o077 == 0, "only the user reads it"
    assert "Traceback (most recent call last)" in log.read_text()
    assert type(error).__name__ in log.read_text()


def test_the_line_and_the_log_of_a_defect_show_no_value_of_a_variable(
    fails: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("NPEFF_TEST_SECRET", SECRET)
    hide_value_of("NPEFF_TEST_SECRET")
    error = ValueError(f"cannot use {SECRET}")
    error.__cause__ = KeyError(SECRET)
    fails(error)
    assert command("status", "x") == 70
    line = capfd.readouterr().err
    written = line + log_named(line.strip()).read_text()
    assert SECRET not in written
    assert "cannot use ${NPEFF_TEST_SECRET}" in written


def test_a_defect_without_a_place_for_its_log_is_one_line(
    fails: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    fails(ValueError("x"))
    assert command("status", "x") == 70
    (line,) = capfd.readouterr().err.splitlines()
    assert "ValueError: x (a defect of npeff; set TMPDIR to a writable folder" in line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "x", "/a/b"), "/a/b: the disk failed"),
        (OSError(errno.ENAMETOOLONG, "x", "/a/b"), "/a/b: the name is too long: choose a shorter path"),
        (OSError(errno.EMFILE, "x"), "writing: too many files are open; raise the limit"),
        (OSError(errno.ESTALE, "x", "/a"), "/a: the network file system has lost the file"),
        (MemoryError(), "the memory of this machine is exhausted; finished work is kept"),
    ],
)
def test_a_failure_of_the_machine_is_a_user_error(
    fails: Any, capfd: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    fails(error)
    assert f"npeff: error: {said}" in refused(capfd, "status", "x")


def test_an_interruption_is_code_130(fails: Any, capfd: pytest.CaptureFixture[str]) -> None:
    fails(KeyboardInterrupt())
    assert command("status", "x") == 130
    assert capfd.readouterr().err == "npeff: interrupted; run the same command again to resume\n"


def test_control_characters_of_a_message_are_escaped(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a\x1b[31m\udcff.yaml"
    assert "a\\x1b[31m\\udcff.yaml" in refused(capfd, "run", path)


def test_a_deleted_current_directory_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        assert "runs/x does not exist" in refused(capfd, "query", "runs/x", "components")
        assert "the current directory does not exist any more" in refused(capfd, "status", "runs/x")
        assert "there is no such user" in refused(capfd, "status", "~no-such-user/x")
    finally:
        os.chdir(tmp_path)


def test_characters_that_a_terminal_cannot_show_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["npeff"])
    monkeypatch.setattr(entry, "main", lambda: print("2 × 3 …", flush=True))
    entry.command()  # type: ignore[unreachable]
    assert shown.getvalue() == b"2 ? 3 ?\n"


NPEFF = [sys.executable, "-m", "npeff"]


@pytest.mark.process
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_closed_pipes_full_disks_and_other_encodings_show_no_traceback(unbuffered: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUNBUFFERED": unbuffered}

    def shell(script: str, *words: str) -> tuple[int, str]:
        ended = subprocess.run(["bash", "-c", script, "-", *NPEFF, *words], env=environment, capture_output=True)
        return ended.returncode, ended.stderr.decode()

    code, shown = shell('"$@" | true; exit ${PIPESTATUS[0]}', "run", "--help")
    assert (code in (0, 1), shown) == (True, "")
    assert shell('"$@" >&-', "--version") == (0, "")
    code, shown = shell('"$@" > /dev/full', "--version")
    assert (code, shown.count("\n")) == (2, 1)
    assert "writing: the disk is full" in shown
