"""What a component's card shows: its examples, what they have in common, and where its direction lives."""

from __future__ import annotations

import base64
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pipeline.query.components import ComponentStore
from pipeline.query.verdict import Verdict, verdicts

CLASSES_SHOWN = 12
PARAMETERS_SHOWN = 12
NEIGHBOURS_SHOWN = 5

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXELATED_BELOW = 65
"""Images narrower than this many pixels are enlarged with sharp edges."""


@dataclass(frozen=True)
class Image:
    """A PNG as a data URI."""

    uri: str
    pixelated: bool


@dataclass(frozen=True)
class Example:
    """One example as a card lists it."""

    example: int
    id: str
    split: str
    label: str | None
    prediction: str | None
    wrong: bool
    coefficient: float
    relative: float
    fisher_norm: float | None
    text: str | None
    image: Image | None
    metadata: list[str]


@dataclass(frozen=True)
class Share:
    """How common one class is among a component's top examples, against all examples."""

    name: str
    label: float | None
    label_base: float | None
    prediction: float | None
    prediction_base: float | None


@dataclass(frozen=True)
class Bar:
    """The share of a direction's energy in one parameter."""

    name: str
    energy: float


@dataclass(frozen=True)
class Card:
    """Everything the report says about one component."""

    component: int
    row: dict[str, Any]
    n_top: int
    held_out: list[Example]
    fit: list[Example]
    mix: list[Share]
    accuracy: float | None
    accuracy_base: float | None
    verdicts: list[Verdict]
    energy: list[Bar]
    neighbours: list[dict[str, Any]]

    @property
    def examples(self) -> list[Example]:
        return self.held_out + self.fit

    @property
    def thumbnails(self) -> list[Example]:
        return (self.held_out or self.fit)[:5]

    @property
    def top_label(self) -> Share | None:
        """The commonest label among the top examples (prediction, where examples have no labels)."""
        return max(self.mix, key=lambda share: (share.label or 0.0, share.prediction or 0.0), default=None)

    @property
    def top_prediction(self) -> Share | None:
        return max(self.mix, key=lambda share: share.prediction or 0.0, default=None)

    @property
    def top_parameter(self) -> Bar | None:
        return max(self.energy, key=lambda bar: bar.energy, default=None)

    def ratio(self, examples: str, sign: int) -> float | None:
        """The KL ratio of one verified row."""
        return next((v.kl_ratio for v in self.verdicts if (v.examples, v.sign) == (examples, sign)), None)

    @property
    def passed(self) -> tuple[int, int]:
        """How many verified rows are above all controls, and how many rows there are."""
        measured = [v for v in self.verdicts if v.above_controls is not None]
        return sum(bool(v.above_controls) for v in measured), len(measured)


class CardWriter:
    """Reads what all cards need once, then makes one card at a time."""

    def __init__(self, store: ComponentStore, examples_shown: int) -> None:
        self._store = store
        self._examples_shown = examples_shown
        self._names = store.class_names()
        self._metadata = store.metadata_columns()
        self._top = _grouped(store.table("top_examples").sort_by([("split", "ascending"), ("rank", "ascending")]))
        self._examples = self._read_examples()
        self._base = _Mix.of(
            store.tables.read("examples", ["label", "prediction", "correct"], pc.field("valid")).to_pylist()
        )
        self._components = {row["component"]: row for row in store.table("components").to_pylist()}
        self._verdicts = self._optional("verification")
        self._energy = self._optional("layer_energy")

    def cards(self) -> list[Card]:
        return [self.card(component) for component in sorted(self._components)]

    def card(self, component: int) -> Card:
        top = self._top.get(component, [])
        mix = _Mix.of([self._examples[row["example"]] for row in top])
        order = {"held_out": 0, "fit": 1}
        found = sorted(verdicts(self._verdicts.get(component, [])), key=lambda v: (order.get(v.examples, 2), -v.sign))
        return Card(
            component=component,
            row=self._components[component],
            n_top=len(top),
            held_out=self._listed(top, "held_out"),
            fit=self._listed(top, "fit"),
            mix=self._shares(mix),
            accuracy=mix.accuracy,
            accuracy_base=self._base.accuracy,
            verdicts=found,
            energy=_bars(self._energy.get(component, [])),
            neighbours=self._store.similar_components(component, NEIGHBOURS_SHOWN).to_pylist(),
        )

    def _listed(self, top: Sequence[dict[str, Any]], split: str) -> list[Example]:
        chosen = [row for row in top if row["split"] == split][: self._examples_shown]
        largest = max((row["coefficient"] for row in top), default=0.0) or 1.0
        return [self._example(row, row["coefficient"] / largest) for row in chosen]

    def _example(self, listed: dict[str, Any], relative: float) -> Example:
        row = self._examples[listed["example"]]
        return Example(
            example=row["example"],
            id=str(row["id"]),
            split=listed["split"],
            label=self._class(row["label"]),
            prediction=self._class(row["prediction"]),
            wrong=row["correct"] is False,
            coefficient=listed["coefficient"],
            relative=relative,
            fisher_norm=row["fisher_norm"],
            text=row.get("text"),
            image=_image(row.get("image")),
            metadata=["" if row[name] is None else str(row[name]) for name in self._metadata],
        )

    def _class(self, number: int | None) -> str | None:
        return None if number is None else self._names.get(number, str(number))

    def _shares(self, mix: _Mix) -> list[Share]:
        """Classes in their own order where they all fit, else those that are commonest among the top examples."""
        classes = sorted(self._base.labels.keys() | self._base.predictions.keys())
        if len(classes) > CLASSES_SHOWN:
            classes.sort(key=lambda c: -max(mix.label(c) or 0.0, mix.prediction(c) or 0.0))
            classes = classes[:CLASSES_SHOWN]
        return [
            Share(self._class(c) or "", mix.label(c), self._base.label(c), mix.prediction(c), self._base.prediction(c))
            for c in classes
        ]

    def _read_examples(self) -> dict[int, dict[str, Any]]:
        wanted = sorted({row["example"] for rows in self._top.values() for row in rows})
        columns = [name for name in self._store.tables.columns("examples") if name not in ("logits", "valid")]
        rows = self._store.tables.read("examples", columns, pc.field("example").isin(wanted)).to_pylist()
        return {row["example"]: row for row in rows}

    def _optional(self, name: str) -> dict[int, list[dict[str, Any]]]:
        return _grouped(self._store.table(name)) if self._store.tables.has(name) else {}


@dataclass(frozen=True)
class _Mix:
    """Counts of labels, predictions and correct answers over some examples."""

    labels: Counter[int]
    predictions: Counter[int]
    n_correct: int
    n_judged: int

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> _Mix:
        judged = [row["correct"] for row in rows if row["correct"] is not None]
        return cls(
            labels=Counter(row["label"] for row in rows if row["label"] is not None),
            predictions=Counter(row["prediction"] for row in rows if row["prediction"] is not None),
            n_correct=sum(judged),
            n_judged=len(judged),
        )

    def label(self, number: int) -> float | None:
        return _share(self.labels, number)

    def prediction(self, number: int) -> float | None:
        return _share(self.predictions, number)

    @property
    def accuracy(self) -> float | None:
        return self.n_correct / self.n_judged if self.n_judged else None


def _share(counts: Counter[int], number: int) -> float | None:
    total = counts.total()
    return counts[number] / total if total else None


def _bars(rows: Iterable[dict[str, Any]]) -> list[Bar]:
    """Parameters in the order of the network; where there are many, the largest, with one bar for all others."""
    bars = [Bar(row["parameter"], row["energy"]) for row in rows]
    if len(bars) <= PARAMETERS_SHOWN:
        return bars
    kept = sorted(bars, key=lambda bar: -bar.energy)[: PARAMETERS_SHOWN - 1]
    others = [bar for bar in bars if bar not in kept]
    return [bar for bar in bars if bar in kept] + [
        Bar(f"{len(others)} other parameters", sum(bar.energy for bar in others))
    ]


def _image(data: bytes | None) -> Image | None:
    if data is None or not data.startswith(_PNG_SIGNATURE) or len(data) < 24:
        return None
    (width,) = struct.unpack(">I", data[16:20])
    return Image("data:image/png;base64," + base64.b64encode(data).decode("ascii"), width < _PIXELATED_BELOW)


def _grouped(table: Any) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["component"], []).append(row)
    return groups
