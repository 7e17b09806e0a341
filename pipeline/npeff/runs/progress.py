"""How long work tells what it has done and how long the rest will take.

On a terminal `TerminalProgress` draws a bar per stage; in a log (a file, a Ray job) `LogProgress` prints a line now and
then; libraries and tests use `SilentProgress`. `ObservedProgress` is any of them, whose numbers somebody else is told
too.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

_LOG_EVERY_S = 5.0


_NO_NUMBERS: Mapping[str, float] = {}


class Ticker(Protocol):
    def __call__(
        self, done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS
    ) -> None:
        """``done`` units are finished by now; ``fact`` is a word on how it goes (a loss); ``last`` where no more units
        will be needed than those; ``numbers`` (a loss, again) are for observers."""
        ...


class Observer(Protocol):
    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        """A stage has ``done`` of ``total`` units."""
        ...


class ProgressDisplay(Protocol):
    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        """Show a stage of ``total`` units, ``done`` of which were finished before."""
        ...

    def say(self, message: str) -> None:
        """Show one line that stays."""
        ...


class SilentProgress:
    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        yield lambda done, fact="", *, last=False, numbers=_NO_NUMBERS: None

    def say(self, message: str) -> None:
        """Nothing is shown."""


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
            TextColumn("[dim]{task.fields[fact]}"),
        )
        with Progress(*columns, console=self._console) as bars:
            bar = bars.add_task(name, total=total, completed=done, unit=unit, fact="starting workers")

            def tick(
                done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS
            ) -> None:
                bars.update(bar, total=done if last else total, completed=done, fact=fact)

            yield tick

    def say(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)


class LogProgress:
    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        before, began, spoken = done, time.monotonic(), time.monotonic()
        first: tuple[float, int] | None = None  # the start of the workers says nothing about the pace
        resumed = f", {before} of them done before" if before else ""
        self.say(f"{name}: {total} {unit}{resumed}")

        def tick(done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS) -> None:
            nonlocal spoken, first
            now = time.monotonic()
            first = first or (now, done)
            last = last or done == total
            if now - spoken >= _LOG_EVERY_S or last:
                spoken = now
                details = f", {_duration(now - began)}" if last else ""
                if first[1] < done and not last:
                    details = f", about {_duration((now - first[0]) / (done - first[1]) * (total - done))} left"
                of_total = "" if last and done < total else f"/{total}"
                self.say(f"{name}: {done}{of_total} {unit}{details}{', ' + fact if fact else ''}")

        yield tick

    def say(self, message: str) -> None:
        print(message, flush=True)


class ObservedProgress:
    """Another display; ``tell`` is told where every stage begins, and of every step."""

    def __init__(self, display: ProgressDisplay, tell: Observer) -> None:
        self._display, self._tell = display, tell

    @contextmanager
    def stage(self, name: str, total: int, unit: str, done: int = 0) -> Iterator[Ticker]:
        self._tell(name, done, total, _NO_NUMBERS)
        with self._display.stage(name, total, unit, done) as shown:

            def tick(
                done: int, fact: str = "", *, last: bool = False, numbers: Mapping[str, float] = _NO_NUMBERS
            ) -> None:
                shown(done, fact, last=last)
                self._tell(name, done, done if last else total, numbers)

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
    """Bars where somebody is looking, lines where output goes into a log."""
    return TerminalProgress(Console()) if sys.stdout.isatty() else LogProgress()
