"""Verdicts: whether a component's direction changes the predictions on its examples more than the controls do.

A step along a component's direction should change the predictions on its top examples and not those on other examples.
The measure is the matched KL ratio: mean KL on top examples / mean KL on baseline examples of the same predicted class
and the same trace of the Fisher. The ratio must exceed three controls on the same examples:
(a) the ratio of the mean traces of the two groups, which the matching makes nearly 1,
(b) the KL ratio of a random direction with the same norm in every tensor, and
(c) the KL ratio of another component's direction.
The headline counts only the informative sign of a component: steps of this sign lower the confidence on the fitted top
examples. Steps of the other sign make predictions more certain, which can change a certain prediction only little.

Tables of earlier versions have no matched baseline and no informative sign. Their ratios and controls are those of
random baseline examples, and control (a) is the ratio of the mean Fisher norms. The signs are then summarized apart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

LEAST_MATCHED = 20
"""Least number of distinct matched baseline examples of a component that counts as matched."""
MOST_TRACE_RATIO = 1.25
"""Largest ratio of the mean traces of the top examples and of the matched baseline, or its inverse, of a component that
counts as matched."""

BREAKS = 1 / 3
"""Least fraction of the correct predictions that is lost by a step that breaks the model."""


def is_matched(n_distinct: int, trace_ratio: float) -> bool:
    """Return whether the matched baseline of a component is large and near enough for the headline."""
    return n_distinct >= LEAST_MATCHED and 1 / MOST_TRACE_RATIO <= trace_ratio <= MOST_TRACE_RATIO


@dataclass(frozen=True)
class Accuracy:
    """The accuracy of the model on a group of examples before and after a step; None without labels."""

    examples: str
    """The group in words."""
    before: float | None
    after: float | None

    @property
    def breaks(self) -> bool:
        """Whether at least a third of the correct predictions is lost."""
        if self.before is None or self.after is None:
            return False
        return self.before > 0 and self.after <= (1 - BREAKS) * self.before


@dataclass(frozen=True)
class Verdict:
    """One row of the verification table: a component, a group of examples, a sign."""

    component: int
    examples: str
    sign: int
    kl_ratio: float | None
    """The matched KL ratio; that of random baseline examples in tables of earlier versions."""
    norm_control: float | None
    random_control: float | None
    other_control: float | None
    matched: bool | None
    """Whether the component counts as matched; None in tables of earlier versions."""
    informative: bool | None
    """Whether the sign is the informative one; None in tables of earlier versions."""
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

    @property
    def mismatch(self) -> str | None:
        """Why the component does not count as matched; None if it does, or in tables of earlier versions."""
        if self.matched is not False:
            return None
        if (distinct := self.row["n_matched"]) < LEAST_MATCHED:
            return f"{distinct} of at least {LEAST_MATCHED} distinct baseline examples"
        return f"the traces differ by a factor of {self.row['trace_ratio']:.2f}"

    @property
    def accuracies(self) -> list[Accuracy]:
        """The accuracy on the top examples, and on the random baseline examples."""
        groups = {"top": "top examples", "baseline": "random baseline examples"}
        return [
            Accuracy(
                words, _measured(self.row[f"accuracy_{group}_before"]), _measured(self.row[f"accuracy_{group}_after"])
            )
            for group, words in groups.items()
        ]

    @property
    def broken(self) -> list[Accuracy]:
        """The groups of examples on which the step breaks the model."""
        return [accuracy for accuracy in self.accuracies if accuracy.breaks]


def verdicts(rows: Iterable[dict[str, Any]]) -> list[Verdict]:
    """Convert rows of the verification table to verdicts. Null and NaN values become None."""
    found = []
    for row in rows:
        informative = row.get("informative")
        ratio, norms = ("kl_ratio", "fisher_norm_ratio") if informative is None else ("kl_ratio_matched", "trace_ratio")
        found.append(
            Verdict(
                component=int(row["component"]),
                examples=str(row["examples"]),
                sign=int(row["sign"]),
                kl_ratio=_measured(row[ratio]),
                norm_control=_measured(row[norms]),
                random_control=_measured(row["random_kl_ratio"]),
                other_control=_measured(row["other_kl_ratio"]),
                matched=row.get("matched"),
                informative=informative,
                row=row,
            )
        )
    return found


@dataclass(frozen=True)
class Scores:
    """Summary of all components for one group of examples.

    The medians and fractions are over the components that count as matched, and for their informative sign.
    """

    examples: str
    sign: int | None
    """The sign; None for the informative sign of each component. Tables of earlier versions have a summary per sign."""
    n: int
    """Number of components in the medians."""
    n_not_matched: int
    """Number of components that are left out because they do not count as matched."""
    median_kl_ratio: float | None
    """Median of the matched KL ratios; None if no component counts as matched."""
    median_trace_ratio: float | None
    """Median of the KL ratios with the baseline that is matched by the trace alone."""
    median_raw_ratio: float | None
    """Median of the KL ratios with random baseline examples."""
    median_norm_control: float | None
    median_random_control: float | None
    median_other_control: float | None
    share_above_1: float | None
    share_above_controls: float | None
    share_surely_above_controls: float | None
    """Fraction of the components whose KL ratio is above all controls with 95% confidence."""

    def to_json(self) -> dict[str, Any]:
        """Return the attributes and the `failure`."""
        return asdict(self) | {"failure": self.failure}

    @property
    def failure(self) -> str | None:
        """Why the components fail the verification as a whole; None if they do not.

        They fail if the median KL ratio is not above 1 and above the median of every control.
        """
        if self.median_kl_ratio is None:
            return None
        bars = {
            "1": 1.0,
            "that of control (a)": self.median_norm_control,
            "that of control (b), a random direction": self.median_random_control,
            "that of control (c), another component's direction": self.median_other_control,
        }
        known = {name: value for name, value in bars.items() if value is not None}
        name = max(known, key=lambda each: known[each])
        if self.median_kl_ratio > known[name]:
            return None
        value = "" if name == "1" else f", {known[name]:.2f}"
        where = "held-out examples" if self.examples == "held_out" else f"{self.examples} examples"
        return f"the median KL ratio on {where}, {self.median_kl_ratio:.2f}, is not above {name}{value}"


def scoreboard(all_verdicts: Iterable[Verdict]) -> list[Scores]:
    """Summarize verdicts, held-out examples first. Rows that were not measured are excluded.

    There is one summary per split, of the informative signs. Tables of earlier versions have one per split and sign.
    """
    groups: dict[tuple[str, int | None], list[Verdict]] = {}
    for verdict in all_verdicts:
        if verdict.informative is False or (verdict.informative is None and verdict.kl_ratio is None):
            continue
        sign = verdict.sign if verdict.informative is None else None
        groups.setdefault((verdict.examples, sign), []).append(verdict)
    order = sorted(groups, key=lambda key: (key[0] == "fit", -(key[1] or 0)))
    return [_scores(examples, sign, groups[examples, sign]) for examples, sign in order]


def _scores(examples: str, sign: int | None, group: list[Verdict]) -> Scores:
    counted = [v for v in group if v.matched is not False and v.kl_ratio is not None]
    return Scores(
        examples=examples,
        sign=sign,
        n=len(counted),
        n_not_matched=len(group) - len(counted),
        median_kl_ratio=median_of_known(v.kl_ratio for v in counted),
        median_trace_ratio=median_of_known(_measured(v.row.get("kl_ratio_trace")) for v in counted),
        median_raw_ratio=median_of_known(_measured(v.row["kl_ratio"]) for v in counted),
        median_norm_control=median_of_known(v.norm_control for v in counted),
        median_random_control=median_of_known(v.random_control for v in counted),
        median_other_control=median_of_known(v.other_control for v in counted),
        share_above_1=share_of(v.kl_ratio is not None and v.kl_ratio > 1 for v in counted),
        share_above_controls=share_of(v.above_controls is True for v in counted),
        share_surely_above_controls=share_of(v.row["above_controls"] is True for v in counted),
    )


def _measured(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def median_of_known(values: Iterable[float | None]) -> float | None:
    """Return the median of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None


def share_of(conditions: Iterable[bool]) -> float | None:
    """Return the fraction of the conditions that are true; None if there are none."""
    found = list(conditions)
    return sum(found) / len(found) if found else None
