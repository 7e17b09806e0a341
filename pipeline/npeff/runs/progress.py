"""Display of the progress of stages, with an estimate of the remaining time.

`TerminalProgress` draws a bar per stage on a terminal, and `NotebookProgress` in a notebook. `LogProgress` prints lines
at intervals, for logs of files and Ray jobs. `SilentProgress` shows nothing. `ObservedProgress` wraps another display
and also passes the progress to an observer. `display` chooses for the functions of the Python interface,
`default_progress` for the command.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from npeff.errors import NpeffError, printable
from npeff.views import in_notebook

_LOG_EVERY_S = 5.0
_REDRAW_EVERY_S = 0.1


_NO_NUMBERS: Mapping[str, float] = {}


class Ticker(Protocol):
    def __call__(
        self, done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS
    ) -> None:
        """Report the progress of a stage.

        Args:
            done: Number of finished units.
            fact: Short text to show beside the progress, such as the loss.
            last: Whether the stage ends with these units, even if it has fewer than its total.
            numbers: Values for observers, such as the loss.
        """
        ...


class Observer(Protocol):
    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """Receive the progress of a stage: ``done`` of ``total`` units are finished."""
        ...


class ProgressDisplay(Protocol):
    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        """Show the progress of a stage of ``total`` units, of which ``done`` were finished before."""
        ...

    def say(self, message: str) -> None:
        """Print one line."""
        ...


class SilentProgress:
    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        yield lambda done, fact="", *, last=False, numbers=_NO_NUMBERS: None

    def say(self, message: str) -> None:
        """Print nothing."""


class TerminalProgress:
    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[fact]}", style="dim", markup=False),
        )
        with Bars(*columns, console=self._console) as bars:
            bar = bars.add_task(name, total=total, completed=done, unit=unit, fact="starting workers")

            def tick(
                done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS
            ) -> None:
                bars.update(bar, total=done if last else total, completed=done, fact=printable(fact))

            yield tick

    def say(self, message: str) -> None:
        self._console.print(Text(printable(message)), soft_wrap=True)


class NotebookProgress:
    """A bar per stage in the output of a cell, as HTML. It needs no widgets, and a saved notebook keeps the bars."""

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        from IPython.display import HTML, display

        began = drawn = time.monotonic()
        shown: Any = display(HTML(_bar(name, done, total, unit, "starting workers")), display_id=True)  # type: ignore[no-untyped-call]

        def tick(done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS) -> None:
            nonlocal drawn
            now, last = time.monotonic(), last or done == total
            if last or now - drawn >= _REDRAW_EVERY_S:
                drawn = now
                facts = ", ".join(filter(None, (_duration(now - began) if last else "", fact)))
                shown.update(HTML(_bar(name, done, done if last else total, unit, facts)))  # type: ignore[no-untyped-call]

        yield tick

    def say(self, message: str) -> None:
        print(printable(message))


def _bar(name: str, done: int, total: int, unit: str, fact: str) -> str:
    texts = (name, f"{done}/{total} {unit}", printable(fact))
    first, count, rest = (escape(text) for text in texts)
    return (
        '<div style="font-size: 13px; white-space: nowrap; font-variant-numeric: tabular-nums">'
        f'<span style="display: inline-block; min-width: 9em">{first}</span>'
        f'<progress value="{done}" max="{max(total, 1)}" style="width: min(16em, 40%); vertical-align: middle">'
        "</progress>"
        f' {count} <span style="opacity: .7">{rest}</span></div>'
    )


class LogProgress:
    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        before, began, printed = done, time.monotonic(), time.monotonic()
        first: tuple[float, int] | None = None  # the rate is measured after the workers have started
        resumed = f", {before} done before" if before else ""
        self.say(f"{name}: {total} {unit}{resumed}")

        def tick(done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS) -> None:
            nonlocal printed, first
            now = time.monotonic()
            first = first or (now, done)
            last = last or done == total
            if now - printed >= _LOG_EVERY_S or last:
                printed = now
                details = f", {_duration(now - began)}" if last else ""
                if first[1] < done and not last:
                    details = f", about {_duration((now - first[0]) / (done - first[1]) * (total - done))} left"
                of_total = "" if last and done < total else f"/{total}"
                self.say(f"{name}: {done}{of_total} {unit}{details}{', ' + fact if fact else ''}")

        yield tick

    def say(self, message: str) -> None:
        print(printable(message), flush=True)


class ObservedProgress:
    """A display whose progress is also passed to ``observer``, at the start of every stage and at every step."""

    def __init__(self, display: ProgressDisplay, observer: Observer) -> None:
        self._display, self._observer = display, observer

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        self._observer(name, done, total, _NO_NUMBERS)
        with self._display.stage(name, total, unit, done) as shown:

            def tick(
                done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS
            ) -> None:
                shown(done, fact, last=last)
                self._observer(name, done, done if last else total, numbers)

            yield tick

    def say(self, message: str) -> None:
        self._display.say(message)


def _duration(seconds: float) -> str:
    if seconds < 180:
        return f"{seconds:.0f} s"
    if seconds < 3 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def default_progress() -> ProgressDisplay:
    """Return progress bars if standard output is a terminal, otherwise lines for a log."""
    return TerminalProgress(Console()) if sys.stdout.isatty() else LogProgress()


class ProgressError(NpeffError):
    """An unknown way to show the progress."""


Progress = ProgressDisplay | Literal["auto", "lines", "none"] | None
"""How a function shows its progress; see `display`."""


def display(progress: Progress) -> ProgressDisplay:
    """Return the display for a function of the Python interface.

    Args:
        progress: ``auto`` for bars on a terminal and in a notebook, and nothing elsewhere, so that the standard output
            of a program stays its own. ``lines`` for lines on standard output, for logs. ``none``, or None, for
            nothing. Any other object is a display and is returned unchanged.

    Raises:
        ProgressError: There is no display of this name.
    """
    if progress is None or progress == "none":
        return SilentProgress()
    if progress == "lines":
        return LogProgress()
    if progress == "auto":
        if in_notebook():
            return NotebookProgress()
        return TerminalProgress(Console()) if sys.stdout.isatty() else SilentProgress()
    if isinstance(progress, str):
        raise ProgressError(f"progress must be auto, lines, none, or a display, not {progress!r}")
    return progress
