"""The table of the components, with a search and an order that are in the address."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npeff.live.snapshot import Snapshot
from npeff.reports.cards import Card

Value = float | str | None


@dataclass(frozen=True)
class Column:
    """A column of the table. Components without a value are last in every order."""

    key: str
    title: str
    value: Callable[[Card], Value]
    kind: str = "number"

    @property
    def first(self) -> str:
        """The order after a first click: ascending for texts and component numbers."""
        return "up" if self.kind in ("text", "component") else "down"


def columns(snapshot: Snapshot) -> list[Column]:
    """Return the columns that the run has values for."""
    named = any(card.annotation.name for card in snapshot.cards)
    found = [
        Column("component", "Component", lambda card: card.component, "component"),
        *([Column("name", "Name", lambda card: card.annotation.name, "text")] if named else []),
        Column("label", "Most common label", _label, "text"),
        Column("fraction", "Fraction", _fraction, "percent"),
        Column("accuracy", "Accuracy", lambda card: card.accuracy, "percent"),
        Column("active", "Active", lambda card: card.row["n_active"]),
        Column("mass", "Mass", lambda card: card.row["mass"]),
        Column("energy", "Energy", lambda card: card.row.get("energy")),
    ]
    for score in snapshot.scores:
        sign = "" if score.sign is None else "+" if score.sign > 0 else "−"
        examples = "held out" if score.examples == "held_out" else score.examples
        key = f"kl-{score.examples}{'' if score.sign is None else '-plus' if score.sign > 0 else '-minus'}"
        found.append(Column(key, f"KL {sign}{examples}", _ratio(score.examples, score.sign)))
    found += [
        Column("controls", "Above controls", _above_controls, "controls"),
        Column("parameter", "Mostly in", lambda card: card.top_parameter.name if card.top_parameter else None, "text"),
        Column("nearest", "Nearest", _nearest, "nearest"),
        Column("stability", "Stability", lambda card: card.row.get("stability")),
    ]
    return found


def chosen(snapshot: Snapshot, words: str, by: Column, order: str) -> list[Card]:
    """Return the cards that contain all words, in order.

    Args:
        snapshot: The run.
        words: The search.
        by: The column to sort by.
        order: "up" or "down".
    """
    wanted = words.lower().split()
    cards = [
        card for card, said in zip(snapshot.cards, snapshot.words, strict=True) if all(word in said for word in wanted)
    ]
    known = [card for card in cards if not _is_missing(by.value(card))]
    others = [card for card in cards if _is_missing(by.value(card))]
    key: Callable[[Card], Any] = lambda card: by.value(card)  # noqa: E731
    return sorted(known, key=key, reverse=order == "down") + others


def common_prefix(snapshot: Snapshot) -> str:
    """Return what the names of all parameters in the table begin with, up to a dot, but for the last two parts."""
    names = {card.top_parameter.name for card in snapshot.cards if card.top_parameter}
    if not names:
        return ""
    levels = itertools.takewhile(lambda of: len(set(of)) == 1, zip(*(name.split(".")[:-2] for name in names)))  # noqa: B905
    return "".join(f"{part}." for part, *_ in levels)


def _is_missing(value: Value) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _label(card: Card) -> str | None:
    top = card.top_label
    return top.name if top is not None and card.examples else None


def _fraction(card: Card) -> float | None:
    top = card.top_label
    if top is None or not card.examples:
        return None
    return top.prediction if top.label is None else top.label


def _ratio(examples: str, sign: int | None) -> Callable[[Card], Value]:
    return lambda card: card.ratio(examples, sign)


def _above_controls(card: Card) -> float | None:
    passed, judged = card.passed
    return passed / judged if judged else None


def _nearest(card: Card) -> float | None:
    return card.neighbours[0]["abs_cosine"] if card.neighbours else None
