"""What the steps along a component's direction do to the predictions on its top examples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from npeff.query.tables import RunTables
from npeff.statistics.verdict import Verdict

FLIPS_SHOWN = 4
CLASSES_SHOWN = 8
EXAMPLES_SHOWN = 6
LEAST_CHANGE = 0.0005
"""Least change of the mean probability of a class that is shown."""

Row = dict[str, Any]
_Key = tuple[int, str, int]


@dataclass(frozen=True)
class Flip:
    """A change of the predicted class, and the fraction of the top examples with it."""

    before: str
    after: str
    share: float


@dataclass(frozen=True)
class StepEffect:
    """The effect of one step on the predictions on the top examples."""

    examples: str
    sign: int
    informative: bool
    changed: float
    """Fraction of the predictions whose class changes."""
    several: bool
    """Whether an example has several predictions. `flips` and `rows` are those of its most changed prediction."""
    tokens: bool
    """Whether the classes are the tokens of a vocabulary."""
    flips: list[Flip]
    """The most frequent changes of the class, the most frequent first."""
    classes: list[Row]
    """Rows of the table `prediction_shifts` with the `change` of the mean probability, the largest change first."""
    rows: list[Row]
    """Rows of the table `example_shifts` of the top examples with the largest KL, with the `id` of the example."""

    @property
    def raised(self) -> Row | None:
        """The class whose mean probability increases most."""
        found = [row for row in self.classes if row["change"] > 0]
        return max(found, key=lambda row: row["change"], default=None)

    @property
    def lowered(self) -> Row | None:
        found = [row for row in self.classes if row["change"] < 0]
        return min(found, key=lambda row: row["change"], default=None)


class ShiftReader:
    """Reads the effects of the steps of a run. There are none if the tables were not written.

    Args:
        tables: The tables of the run.
        names: The names of the classes; empty for a vocabulary.
        several: Whether the examples have several predictions.
    """

    def __init__(self, tables: RunTables, names: Mapping[int, str], several: bool) -> None:
        self._tokens, self._several = not names, several
        self._classes = _by_step(tables, "prediction_shifts")
        self._examples = _by_step(tables, "example_shifts")
        shown = {row["example"] for rows in self._examples.values() for row in _most_changed(rows)}
        found = tables.read("examples", ["example", "id"], pc.field("example").isin(sorted(shown))).to_pylist()
        self._ids = {row["example"]: str(row["id"]) for row in found}

    def effects(self, verdicts: Sequence[Verdict]) -> list[StepEffect]:
        """Return the effects of a component's steps, that of the informative sign first.

        They are the effects on the examples of the first verdict.
        """
        rows = [verdict for verdict in verdicts if verdict.examples == verdicts[0].examples]
        found = [effect for verdict in rows if (effect := self._effect(verdict)) is not None]
        return sorted(found, key=lambda effect: not effect.informative)

    def _effect(self, verdict: Verdict) -> StepEffect | None:
        key = (verdict.component, verdict.examples, verdict.sign)
        classes, examples = self._classes.get(key, []), self._examples.get(key, [])
        if verdict.informative is None or not classes or not examples:  # a table of an earlier version
            return None
        return step_effect(
            classes,
            examples,
            self._ids,
            examples_of=verdict.examples,
            sign=verdict.sign,
            informative=bool(verdict.informative),
            changed=verdict.row["changed_top"],
            several=self._several,
            tokens=self._tokens,
        )


def step_effect(
    classes: Sequence[Row],
    examples: Sequence[Row],
    ids: Mapping[int, str],
    *,
    examples_of: str,
    sign: int,
    informative: bool,
    changed: float,
    several: bool,
    tokens: bool,
    most: int = EXAMPLES_SHOWN,
) -> StepEffect:
    """Return the effect of a step.

    Args:
        classes: Rows of the table `prediction_shifts`.
        examples: Rows of the table `example_shifts`.
        ids: The ids of the examples.
        examples_of: The split of the examples.
        sign: The sign of the step.
        informative: Whether it is the informative sign.
        changed: Fraction of the predictions whose class changes.
        several: Whether an example has several predictions.
        tokens: Whether the classes are the tokens of a vocabulary.
        most: Largest number of examples in `StepEffect.rows`.
    """
    classes = [row | {"change": row["p_after"] - row["p_before"], "name": _name(row)} for row in classes]
    classes.sort(key=lambda row: -abs(row["change"]))
    examples = [
        {"context": None} | row | {when: _name(row, when) for when in ("before", "after")} for row in examples
    ]  # tables of earlier versions have no context
    flips = Counter((row["before"], row["after"]) for row in examples if row["class_before"] != row["class_after"])
    return StepEffect(
        examples=examples_of,
        sign=sign,
        informative=informative,
        changed=changed,
        several=several,
        tokens=tokens,
        flips=[Flip(*pair, count / len(examples)) for pair, count in flips.most_common(FLIPS_SHOWN)],
        classes=[row for row in classes if abs(row["change"]) >= LEAST_CHANGE][:CLASSES_SHOWN] or classes[:2],
        rows=[row | {"id": ids[row["example"]]} for row in _most_changed(examples, most)],
    )


def _most_changed(rows: Sequence[Row], most: int = EXAMPLES_SHOWN) -> list[Row]:
    return sorted(rows, key=lambda row: (-row["kl"], row["rank"]))[:most]


def _name(row: Row, when: str | None = None) -> str:
    name, number = (row["name"], row["class"]) if when is None else (row[f"name_{when}"], row[f"class_{when}"])
    return str(number) if name is None else name


def _by_step(tables: RunTables, name: str) -> dict[_Key, list[Row]]:
    found: dict[_Key, list[Row]] = {}
    if tables.has(name):
        for row in tables.read(name).to_pylist():
            found.setdefault((row["component"], row["examples"], row["sign"]), []).append(row)
    return found
