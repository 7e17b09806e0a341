"""What is shown of long work, in a log and on a terminal."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from pipeline import progress
from pipeline.progress import LogProgress, SilentProgress, TerminalProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_says_what_is_left_from_the_pace_of_this_session(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with LogProgress().stage("fishers", 10, "shards", done=4) as tick:
        clock[0] += 60  # starting workers and the first shard: no pace yet
        tick(5)
        clock[0] += 8
        tick(7)
        clock[0] += 1
        tick(8)
        clock[0] += 9
        tick(10, "all of them")
    assert capsys.readouterr().out.splitlines() == [
        "fishers: 10 shards, 4 of them done before",
        "fishers: 5/10 shards",
        "fishers: 7/10 shards, about 12 s left",
        "fishers: 10/10 shards, 78 s, all of them",
    ]


def test_a_log_of_work_that_ends_early_does_not_claim_the_rest(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with LogProgress().stage("factorize", 100, "steps") as tick:
        tick(13, "converged", last=True)
    assert capsys.readouterr().out.splitlines()[-1] == "factorize: 13 steps, 0 s, converged"


def test_a_terminal_shows_a_bar_with_its_numbers() -> None:
    shown = io.StringIO()
    display = TerminalProgress(Console(file=shown, force_terminal=True, width=100))
    with display.stage("verify", 7, "components", done=2) as tick:
        tick(3)
        tick(7, "done")
    display.say("a line that [stays]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "7/7 components" in text
    assert "a line that [stays]" in text


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with SilentProgress().stage("lift", 3, "directions") as tick:
        tick(3, last=True)
    assert capsys.readouterr() == ("", "")
