"""Verdicts: whether a component's direction changes the predictions on its examples more than the controls do.

A step along a component's direction should change the predictions on its top examples and not those on random baseline
examples: KL ratio = mean KL on top examples / mean KL on baseline examples. The ratio must exceed three controls:
(a) the ratio of the mean Fisher norms of the two groups, because predictions on examples with large Fishers change
    under any step,
(b) the KL ratio of a random direction with the same norm in every tensor, and
(c) the KL ratio of another component's direction on the same examples.
Steps of both signs have separate rows and are never averaged.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """One row of the verification table: a component, a group of examples, a sign."""

    component: int
    examples: str
    sign: int
    kl_ratio: float | None
    norm_control: float | None
    random_control: float | None
    other_control: float | None
    row: dict[str, Any]

    @property
    def best_control(self) -> float | None:
        controls = [
            value for value in (self.norm_control, self.random_control, self.other_control) if value is not None
        ]
        return max(controls) if controls else None

    @property
    def above_controls(self) -> bool | None:
        """Whether the KL ratio is above all controls; None if the ratio or all controls were not measured."""
        if self.kl_ratio is None or self.best_control is None:
            return None
        return self.kl_ratio > self.best_control


def verdicts(rows: Iterable[dict[str, Any]]) -> list[Verdict]:
    """Convert rows of the verification table to verdicts. Null and NaN values become None."""
    return [
        Verdict(
            component=int(row["component"]),
            examples=str(row["examples"]),
            sign=int(row["sign"]),
            kl_ratio=_measured(row["kl_ratio"]),
            norm_control=_measured(row["fisher_norm_ratio"]),
            random_control=_measured(row["random_kl_ratio"]),
            other_control=_measured(row["other_kl_ratio"]),
            row=row,
        )
        for row in rows
    ]


@dataclass(frozen=True)
class Scores:
    """Summary of all components for one group of examples and one sign."""

    examples: str
    sign: int
    n: int
    median_kl_ratio: float
    median_norm_control: float | None
    median_random_control: float | None
    median_other_control: float | None
    share_above_1: float
    share_above_controls: float
    share_surely_above_controls: float
    """Fraction of the rows whose KL ratio is above all controls with 95% confidence."""


def scoreboard(all_verdicts: Iterable[Verdict]) -> list[Scores]:
    """Summarize verdicts per (examples, sign), held-out examples first. Rows that were not measured are excluded."""
    groups: dict[tuple[str, int], list[Verdict]] = {}
    for verdict in all_verdicts:
        if verdict.kl_ratio is not None:
            groups.setdefault((verdict.examples, verdict.sign), []).append(verdict)
    return [
        Scores(
            examples=examples,
            sign=sign,
            n=len(group),
            median_kl_ratio=statistics.median(v.kl_ratio for v in group if v.kl_ratio is not None),
            median_norm_control=_median(v.norm_control for v in group),
            median_random_control=_median(v.random_control for v in group),
            median_other_control=_median(v.other_control for v in group),
            share_above_1=sum(v.kl_ratio is not None and v.kl_ratio > 1 for v in group) / len(group),
            share_above_controls=sum(v.above_controls is True for v in group) / len(group),
            share_surely_above_controls=sum(v.row["above_controls"] is True for v in group) / len(group),
        )
        for (examples, sign), group in sorted(groups.items(), key=lambda item: (item[0][0] == "fit", -item[0][1]))
    ]


def _measured(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None
