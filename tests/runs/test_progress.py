"""What is shown of long work, in a log and on a terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
from npeff.runs import progress
from npeff.runs.progress import (
    LogProgress,
    NotebookProgress,
    ObservedProgress,
    ProgressError,
    SilentProgress,
    TerminalProgress,
    display,
)
from rich.console import Console


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
        "fishers: 10 shards, 4 done before",
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


def test_long_waits_are_in_minutes_and_hours(capsys: pytest.CaptureFixture[str], clock: list[float]) -> None:
    with LogProgress().stage("fishers", 1000, "shards") as tick:
        tick(1)
        clock[0] += 60
        tick(2)
        clock[0] += 60
        tick(801)
        tick(900, last=True)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:] == [
        "fishers: 2/1000 shards, about 16.6 h left",
        "fishers: 801/1000 shards, about 30 s left",
        "fishers: 900 shards, 120 s",
    ]


def test_every_line_of_a_log_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Pipe(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue())

    monkeypatch.setattr("sys.stdout", Pipe())
    LogProgress().say("fishers: 10 shards")
    assert seen == ["fishers: 10 shards\n"]


def test_an_observer_is_told_where_a_stage_begins_and_of_every_step() -> None:
    told: list[tuple[str, int, int, dict[str, float]]] = []
    observed = ObservedProgress(SilentProgress(), lambda *facts: told.append((*facts[:3], dict(facts[3]))))
    with observed.stage("factorize", 100, "steps", done=2) as tick:
        tick(3, "explained 0.5", numbers={"loss": 7.0, "explained": 0.5})
        tick(4, "converged", last=True)
    assert told == [
        ("factorize", 2, 100, {}),
        ("factorize", 3, 100, {"loss": 7.0, "explained": 0.5}),
        ("factorize", 4, 4, {}),
    ]


@pytest.mark.process
def test_metrics_need_no_ray() -> None:
    script = (
        "import sys; from npeff.execution.ray.metrics import RunMetrics;"
        "RunMetrics('run')('fishers', 1, 2, {'loss': 1.0}); print('ray' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_a_terminal_shows_a_bar_with_its_numbers() -> None:
    shown = io.StringIO()
    terminal = TerminalProgress(Console(file=shown, force_terminal=True, width=100))
    with terminal.stage("verify", 7, "components", done=2) as tick:
        tick(3)
        tick(7, "done")
    terminal.say("a line that [stays]")
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    assert "7/7 components" in text
    assert "a line that [stays]" in text


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with SilentProgress().stage("lift", 3, "directions") as tick:
        tick(3, last=True)
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_python_shows_bars_on_a_terminal_and_in_a_notebook_and_nothing_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert isinstance(display("auto"), SilentProgress)
    assert isinstance(display("lines"), LogProgress)
    assert isinstance(display("none"), SilentProgress)
    assert isinstance(display(None), SilentProgress)
    own = LogProgress()
    assert display(own) is own
    with pytest.raises(ProgressError, match="auto, lines, none, or a display, not 'bars'"):
        display("bars")  # type: ignore[arg-type]
    monkeypatch.setattr("sys.stdout", Terminal())
    assert isinstance(display("auto"), TerminalProgress)
    monkeypatch.setattr("npeff.runs.progress.in_notebook", lambda: True)
    assert isinstance(display("auto"), NotebookProgress)


def test_a_notebook_shows_a_bar_that_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    class Handle:
        def update(self, html) -> None:
            shown.append(html.data)

    def first(html, *, display_id: bool) -> Handle:
        assert display_id
        shown.append(html.data)
        return Handle()

    pytest.importorskip("IPython")
    monkeypatch.setattr("IPython.display.display", first)
    with NotebookProgress().stage("verify", 7, "components", done=2) as tick:
        tick(3)  # too soon after the first picture
        tick(5, "loss <0.5>", last=True)
    assert len(shown) == 2
    assert 'value="2" max="7"' in shown[0]
    assert 'value="5" max="5"' in shown[1]
    assert "5/5 components" in shown[1]
    assert "loss &lt;0.5&gt;" in shown[1]
