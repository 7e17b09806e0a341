"""Layout of plots: functions that convert numbers to coordinates, which the templates draw as SVG.

Plots are SVG elements of the page and not images. They use the colours of the light or dark theme, their marks have
links and tooltips, and the file stays small. All lengths are in SVG user units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from npeff.statistics.verdict import Verdict

_LINE = 16.0
"""Height of a line of text, such as the label of a tick."""
_CHARACTER = 7.0
"""Width of a digit of a label."""
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Tick:
    """A mark on an axis; minor ticks have no label."""

    position: float
    label: str
    value: float


@dataclass(frozen=True)
class Axis:
    """Linear or logarithmic map from values in [low, high] to positions from `start` to `stop`.

    Values outside are clipped, so an infinite ratio is drawn at the end of the axis.
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def position(self, value: float) -> float:
        low, high = self.low, self.high
        inside = min(max(value, low), high)
        if self.log:
            low, high, inside = math.log10(low), math.log10(high), math.log10(inside)
        return round(self.start + (self.stop - self.start) * (inside - low) / (high - low), 2)

    def ticks(self, about: int = 5) -> list[Tick]:
        """Return ticks at round values: powers of ten on a log axis, steps of 1, 2 or 5 on a linear axis.

        On a log axis with many decades, ticks are at every second, third, ... power, a line of text apart.
        """
        if self.log:
            decades = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            span = max(len(decades), math.log10(self.high) - math.log10(self.low))  # the ends may be within a decade
            every = math.ceil(_LINE * span / abs(self.stop - self.start))
            return [self._tick(10.0**power, _power(power)) for power in decades if power % every == 0]
        step = _round_step((self.high - self.low) / about)
        if math.floor(self.high / step + 1e-9) <= math.ceil(self.low / step - 1e-9):
            step = _round_step(0.4 * step)  # the next smaller step, since there are fewer than two ticks
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [self._tick(i * step, f"{i * step:.{_decimals(step)}f}") for i in range(first, last + 1)]

    def level_ticks(self, about: int = 5, at_most: int = 99, character: float = _CHARACTER) -> list[Tick]:
        """Return ticks of a horizontal axis: every tick, or every second, third, ... tick, so that no labels touch.

        Args:
            about: As in `ticks`.
            at_most: Largest number of ticks, about.
            character: Width of a character of the labels. Labels are centred at their ticks.
        """
        ticks = self.ticks(about)
        one = next((place for place, tick in enumerate(ticks) if tick.value == 1), 0) if self.log else 0
        for every in range(max(1, math.ceil(len(ticks) / at_most)), len(ticks)):
            kept = ticks[one % every :: every]
            if all(_apart(a, b, character) for a, b in pairwise(kept)):
                return kept
        return ticks[one : one + 1]

    def _tick(self, value: float, label: str) -> Tick:
        return Tick(self.position(value), label, value)

    def minor_ticks(self) -> list[float]:
        """Return the positions of the multiples 2..9 of the powers of ten."""
        if not self.log:
            return []
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)))
        values = [multiple * 10.0**power for power in powers for multiple in range(2, 10)]
        return [self.position(value) for value in values if self.low < value < self.high]


def log_axis(values: Iterable[float | None], start: float, stop: float) -> Axis:
    """Return a log axis of whole decades that includes all positive finite values and 1."""
    logs = [math.log10(value) for value in values if value is not None and 0 < value < math.inf]
    low, high = math.floor(min([*logs, -0.3])), math.ceil(max([*logs, 0.3]))
    return Axis(10.0**low, 10.0**high, start, stop, log=True)


@dataclass(frozen=True)
class LossStep:
    """One iteration of the solver."""

    x: float
    y: float
    accepted: bool
    above: bool
    iteration: int
    loss: float
    explained: float | None


@dataclass(frozen=True)
class LossChart:
    """Loss by iteration. The right axis shows the same line as explained variance."""

    width: float
    height: float
    x_axis: Axis
    y_axis: Axis
    explained_ticks: list[Tick]
    steps: list[LossStep]

    @property
    def line(self) -> str:
        return " ".join(f"{step.x},{step.y}" for step in self.steps if step.accepted)

    @property
    def rejected(self) -> list[LossStep]:
        return [step for step in self.steps if not step.accepted]


def loss_chart(history: Sequence[dict[str, Any]], width: float = 560, height: float = 300) -> LossChart | None:
    """Lay out the history table. A rejected step far above the accepted losses is drawn at the top edge."""
    rows = [row for row in history if row["loss"] is not None and math.isfinite(row["loss"])]
    accepted = [row["loss"] for row in rows if row["accepted"]]
    if not accepted:
        return None
    low, high = min(accepted), max(accepted)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    iterations = [row["iteration"] for row in rows]
    x_axis = Axis(min(iterations), max(max(iterations), min(iterations) + 1), 62, width - 70)
    y_axis = Axis(low - margin, high + margin, height - 44, 14)
    steps = [
        LossStep(
            x=x_axis.position(row["iteration"]),
            y=y_axis.position(row["loss"]),
            accepted=bool(row["accepted"]),
            above=row["loss"] > y_axis.high,
            iteration=row["iteration"],
            loss=row["loss"],
            explained=row.get("explained"),
        )
        for row in rows
    ]
    return LossChart(width, height, x_axis, y_axis, _explained_ticks(steps, y_axis), steps)


def _explained_ticks(steps: Sequence[LossStep], y_axis: Axis) -> list[Tick]:
    """Return ticks of explained = 1 - loss / total on the loss axis. One step determines the total."""
    for step in steps:
        if step.explained is not None and step.explained < 1:
            total = step.loss / (1 - step.explained)
            if total > 0:
                axis = Axis(1 - y_axis.high / total, 1 - y_axis.low / total, y_axis.start, y_axis.stop)
                flipped = Axis(axis.low, axis.high, axis.stop, axis.start)
                return flipped.ticks()
    return []


@dataclass(frozen=True)
class Lollipop:
    """One verification row: a stem from its best control to its KL ratio, and marks for the controls."""

    x: float
    ratio_y: float
    best_control_y: float | None
    norm_y: float | None
    random_y: float | None
    other_y: float | None
    verdict: Verdict

    @property
    def infinite(self) -> bool:
        """Whether the KL ratio is infinite, because the baseline predictions do not change."""
        return self.verdict.kl_ratio == math.inf


@dataclass(frozen=True)
class Slot:
    """A component on the horizontal axis of the plot."""

    component: int
    x: float
    labelled: bool


@dataclass(frozen=True)
class RatioChart:
    """KL ratios of one group of examples with their controls.

    Components are sorted by their informative sign, those of earlier versions by their weaker sign.
    """

    examples: str
    width: float
    height: float
    sorted_by: str
    y_axis: Axis
    one_y: float
    slots: list[Slot]
    lollipops: list[Lollipop]
    radius: float


def ratio_chart(examples: str, rows: Sequence[Verdict], y_axis: Axis, width: float = 1120) -> RatioChart | None:
    """Lay out the verification rows of one group of examples. Both signs of a component are next to each other."""
    chosen = [row for row in rows if row.examples == examples and row.kl_ratio is not None]
    if not chosen:
        return None
    weakest: dict[int, float] = {}
    for row in chosen:
        if row.informative is False:
            weakest.setdefault(row.component, -1.0)  # known only if the informative sign was measured, too
        else:
            former = weakest.get(row.component, math.inf)
            weakest[row.component] = min(math.inf if former < 0 else former, row.kl_ratio or 0.0)
    order = sorted(weakest, key=lambda component: (-weakest[component], component))
    left, right = 62.0, 14.0
    step = (width - left - right) / len(order)
    middle = {component: left + step * (position + 0.5) for position, component in enumerate(order)}
    every = max(1, math.ceil(_CHARACTER * (len(str(max(order))) + 1) / step))
    slots = [Slot(j, round(middle[j], 2), position % every == 0) for position, j in enumerate(order)]
    offset = min(0.2 * step, 9.0)
    lollipops = [_lollipop(row, middle[row.component] - row.sign * offset, y_axis) for row in chosen]
    return RatioChart(
        examples=examples,
        width=width,
        height=y_axis.start + 46,
        sorted_by="the smaller KL ratio of its two signs" if chosen[0].informative is None else "its informative sign",
        y_axis=y_axis,
        one_y=y_axis.position(1.0),
        slots=slots,
        lollipops=lollipops,
        radius=round(min(5.0, max(1.5, 0.14 * step)), 2),
    )


def _lollipop(row: Verdict, x: float, axis: Axis) -> Lollipop:
    def position(value: float | None) -> float | None:
        return None if value is None else axis.position(value)

    return Lollipop(
        x=round(x, 2),
        ratio_y=axis.position(row.kl_ratio or 0.0),
        best_control_y=position(row.best_control),
        norm_y=position(row.norm_control),
        random_y=position(row.random_control),
        other_y=position(row.other_control),
        verdict=row,
    )


def full_width(fractions: Iterable[float | None]) -> float:
    """Return the fraction that a bar of full width stands for in a table: 1, 0.5, 0.2, 0.1, ..., at least the largest.

    Small fractions, such as the probabilities of the tokens of a vocabulary, can then be compared by their bars.
    """
    largest = max((value for value in fractions if value is not None and value > 0), default=1.0)
    return min(1.0, _round_step(largest))


def _apart(first: Tick, second: Tick, character: float) -> bool:
    """Return whether there is room for a character between the labels of two ticks."""
    return abs(second.position - first.position) >= character * ((len(first.label) + len(second.label)) / 2 + 1)


def _power(exponent: int) -> str:
    """Return a power of ten as a short text."""
    if -4 < exponent < 5:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(_RAISED)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def _decimals(step: float) -> int:
    return max(0, -math.floor(math.log10(step) + 1e-9))
