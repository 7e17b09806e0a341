"""The card of a component: its examples, their common properties, and the parameters of its direction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from npeff.query.components import ComponentStore
from npeff.reports.contrast import Contrast, classes_of, contrast_examples
from npeff.reports.in_common import Common, in_common
from npeff.reports.input_evidence import InputEvidence, InputReader, Shown
from npeff.reports.input_groups import GroupOfComponent
from npeff.reports.inputs_section import InputsSection, inputs_section
from npeff.reports.pictures import Album, Image
from npeff.reports.selectivity_chart import Selectivity, selectivity_by_component
from npeff.reports.shifts import ShiftReader, StepEffect
from npeff.reports.token_names import token_names
from npeff.reports.token_shares import ShareReader, Shares
from npeff.statistics.verdict import Verdict, verdicts
from npeff.store.annotations import Annotation

CLASSES_SHOWN = 12
PARAMETERS_SHOWN = 12
NEIGHBOURS_SHOWN = 5
CONTRAST_SHOWN = 12
VALUES_SHOWN = 6
WORDS_SHOWN = 12
INPUT_GROUPS_SHOWN = 6
METADATA_LENGTH = 40


@dataclass(frozen=True)
class Example:
    """One example in the list of a card."""

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
    shares: Shares | None = None
    """Shares of the positions for the component: the evidence of the parameters."""
    inputs: InputEvidence | None = None
    """The information in the inputs, which is the same on every card."""
    alike: float | None = None
    """For a contrast example, the cosine between its other coefficients and those of the top examples."""

    @property
    def heats(self) -> list[tuple[str, str]]:
        """The heat maps to draw over the image of the example, each with its name."""
        found = {"parameters": self.shares, "inputs": self.inputs.shares if self.inputs is not None else None}
        return [(name, shares.heat) for name, shares in found.items() if shares is not None and shares.heat is not None]


@dataclass(frozen=True)
class Share:
    """The fractions of one class among a component's top examples and among all examples."""

    name: str
    label: float | None
    label_base: float | None
    prediction: float | None
    prediction_base: float | None


@dataclass(frozen=True)
class Bar:
    """The fraction of a direction's energy in one parameter, or in all that have no bar."""

    name: str
    energy: float
    of_others: bool = False


@dataclass(frozen=True)
class Card:
    """The content of the report for one component."""

    component: int
    annotation: Annotation
    row: dict[str, Any]
    n_top: int
    held_out: list[Example]
    fit: list[Example]
    contrast: list[Example]
    mix: list[Share]
    accuracy: float | None
    accuracy_base: float | None
    verdicts: list[Verdict]
    effects: list[StepEffect]
    """What a step of each sign does to the predictions, the informative sign first."""
    selectivity: list[Selectivity]
    common: Common
    energy: list[Bar]
    input_groups: list[GroupOfComponent]
    neighbours: list[dict[str, Any]]

    @property
    def examples(self) -> list[Example]:
        return self.held_out + self.fit

    @property
    def has_inputs(self) -> bool:
        return any(example.inputs is not None for example in self.examples + self.contrast)

    @property
    def thumbnails(self) -> list[Example]:
        return (self.held_out or self.fit)[:5]

    @property
    def top_label(self) -> Share | None:
        """The most common label of the top examples, or the most common prediction if there are no labels."""
        return max(self.mix, key=lambda share: (share.label or 0.0, share.prediction or 0.0), default=None)

    @property
    def top_prediction(self) -> Share | None:
        return max(self.mix, key=lambda share: share.prediction or 0.0, default=None)

    @property
    def top_parameter(self) -> Bar | None:
        named = [bar for bar in self.energy if not bar.of_others]
        return max(named, key=lambda bar: bar.energy, default=None)

    def ratio(self, examples: str, sign: int | None) -> float | None:
        """Return the KL ratio of one verification row, that of the informative sign if ``sign`` is None."""
        rows = (
            v for v in self.verdicts if v.examples == examples and (v.informative if sign is None else v.sign == sign)
        )
        return next((v.kl_ratio for v in rows), None)

    @property
    def passed(self) -> tuple[int, int]:
        """The number of verification rows above all controls, and the number of rows that count.

        Rows of uninformative signs and without a matched baseline do not count.
        """
        measured = [
            v
            for v in self.verdicts
            if v.above_controls is not None and v.informative is not False and v.matched is not False
        ]
        return sum(bool(v.above_controls) for v in measured), len(measured)

    @property
    def unmatched(self) -> list[Verdict]:
        """The verification rows of the informative sign without a matched baseline, which do not count."""
        return [v for v in self.verdicts if v.informative and v.mismatch is not None]


class CardWriter:
    """Creates cards. The constructor reads the data that all cards need."""

    def __init__(self, store: ComponentStore, examples_shown: int) -> None:
        self._store = store
        self._examples_shown = examples_shown
        named = store.class_names()
        self._names = named or token_names(store.tables)
        self._annotations = store.annotations.of_component
        self._metadata = store.metadata_columns()
        self._top = _grouped(store.table("top_examples").sort_by([("split", "ascending"), ("rank", "ascending")]))
        members = {component: [row["example"] for row in rows] for component, rows in self._top.items()}
        self._contrast = contrast_examples(store.stored_coefficients, members, classes_of(store.tables), CONTRAST_SHOWN)
        self._common = in_common(store.tables, self._metadata, members)
        self._examples = self._read_examples()
        self.album = Album({example: row.get("image") for example, row in self._examples.items()})
        self._shares = ShareReader(store.tables, sorted({example for top in members.values() for example in top}))
        self._inputs = InputReader(store.tables, self._names, self._shown())
        self.inputs: InputsSection | None = inputs_section(store.tables, members)
        columns = ["label", "prediction", "correct"]
        self._base = _Mix.of_table(store.tables.read("examples", columns, pc.field("valid")))
        self._components = {row["component"]: row for row in store.table("components").to_pylist()}
        self._verdicts = self._optional("verification")
        self._energy = self._optional("layer_energy")
        self._shifts = ShiftReader(store.tables, named, several=not self._base.predictions)
        moved = store.tables.has("selectivity")
        self._selectivity = selectivity_by_component(store.table("selectivity")) if moved else {}

    def cards(self) -> list[Card]:
        return [self.card(component) for component in sorted(self._components)]

    def card(self, component: int) -> Card:
        top = self._top.get(component, [])
        mix = _Mix.of([self._examples[row["example"]] for row in top])
        order = {"held_out": 0, "fit": 1}
        found = sorted(verdicts(self._verdicts.get(component, [])), key=lambda v: (order.get(v.examples, 2), -v.sign))
        common = self._common.get(component, Common([], [], []))
        return Card(
            component=component,
            annotation=self._annotations.get(component, Annotation()),
            row=self._components[component],
            n_top=len(top),
            held_out=self._listed(top, "held_out"),
            fit=self._listed(top, "fit"),
            contrast=[self._contrasting(found, top) for found in self._contrast.get(component, [])],
            mix=self._mixed(mix),
            accuracy=mix.accuracy,
            accuracy_base=self._base.accuracy,
            verdicts=found,
            effects=self._shifts.effects(found),
            selectivity=self._selectivity.get(component, []),
            common=Common(common.values[:VALUES_SHOWN], common.words[:WORDS_SHOWN], common.numbers),
            energy=bars(self._energy.get(component, [])),
            input_groups=self._groups_of(component),
            neighbours=self._store.similar_components(component, NEIGHBOURS_SHOWN).to_pylist(),
        )

    def _chosen(self, top: Sequence[dict[str, Any]], split: str) -> list[dict[str, Any]]:
        """Return the rows of the top examples of a split that the card lists."""
        return [row for row in top if row["split"] == split][: self._examples_shown]

    def _listed(self, top: Sequence[dict[str, Any]], split: str) -> list[Example]:
        chosen = self._chosen(top, split)
        return [self._example(row["component"], row["example"], row["coefficient"], top) for row in chosen]

    def _shown(self) -> dict[int, Shown]:
        """Return the examples that any card lists."""
        listed = [
            row for top in self._top.values() for split in ("held_out", "fit") for row in self._chosen(top, split)
        ]
        numbers = {row["example"] for row in listed} | {each.example for c in self._contrast.values() for each in c}
        return {n: Shown(self._examples[n].get("text"), self.album.image(n)) for n in sorted(numbers)}

    def _groups_of(self, component: int) -> list[GroupOfComponent]:
        """Return the groups of inputs with the largest mean shares among the top examples."""
        groups = self.inputs.groups if self.inputs is not None else None
        found = groups.of_component.get(component, []) if groups is not None else []
        return sorted(found, key=lambda group: -group.share)[:INPUT_GROUPS_SHOWN]

    def _contrasting(self, found: Contrast, top: Sequence[dict[str, Any]]) -> Example:
        return replace(self._example(None, found.example, found.coefficient, top), alike=found.cosine)

    def _example(
        self, component: int | None, example: int, coefficient: float, top: Sequence[dict[str, Any]]
    ) -> Example:
        """Return an example for the list of a card, with its position shares for `component`."""
        row, image = self._examples[example], self.album.image(example)
        largest = max(listed["coefficient"] for listed in top) or 1.0
        text, shape = row.get("text"), None if image is None else (image.height, image.width)
        return Example(
            example=example,
            id=str(row["id"]),
            split=row["split"],
            label=self._class(row["label"]),
            prediction=self._class(row["prediction"]),
            wrong=row["correct"] is False,
            coefficient=coefficient,
            relative=coefficient / largest,
            fisher_norm=row["fisher_norm"],
            text=text,
            image=image,
            metadata=[_short(row[name]) for name in self._metadata],
            shares=None if component is None else self._shares.shares(component, example, text, shape),
            inputs=self._inputs.evidence(example),
        )

    def _class(self, number: int | None) -> str | None:
        return None if number is None else self._names.get(number, str(number))

    def _mixed(self, mix: _Mix) -> list[Share]:
        """Return all classes in order if they fit, otherwise the most common classes of the top examples."""
        classes = sorted(self._base.labels.keys() | self._base.predictions.keys())
        if len(classes) > CLASSES_SHOWN:
            classes.sort(key=lambda c: -max(mix.label(c) or 0.0, mix.prediction(c) or 0.0))
            classes = classes[:CLASSES_SHOWN]
        return [
            Share(self._class(c) or "", mix.label(c), self._base.label(c), mix.prediction(c), self._base.prediction(c))
            for c in classes
        ]

    def _read_examples(self) -> dict[int, dict[str, Any]]:
        listed = {row["example"] for rows in self._top.values() for row in rows}
        wanted = sorted(listed | {found.example for rows in self._contrast.values() for found in rows})
        columns = [name for name in self._store.tables.columns("examples") if name not in ("logits", "valid")]
        rows = self._store.tables.read("examples", columns, pc.field("example").isin(wanted)).to_pylist()
        return {row["example"]: row for row in rows}

    def _optional(self, name: str) -> dict[int, list[dict[str, Any]]]:
        return _grouped(self._store.table(name)) if self._store.tables.has(name) else {}


@dataclass(frozen=True)
class _Mix:
    """Counts of labels, predictions and correct predictions of some examples."""

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

    @classmethod
    def of_table(cls, table: pa.Table) -> _Mix:
        counts = (
            {entry["values"].as_py(): entry["counts"].as_py() for entry in table[name].drop_null().value_counts()}
            for name in ("label", "prediction")
        )
        labels, predictions = map(Counter, counts)
        judged = table["correct"].drop_null()
        return cls(labels, predictions, n_correct=pc.sum(judged).as_py() or 0, n_judged=len(judged))

    def label(self, number: int) -> float | None:
        return _share(self.labels, number)

    def prediction(self, number: int) -> float | None:
        return _share(self.predictions, number)

    @property
    def accuracy(self) -> float | None:
        return self.n_correct / self.n_judged if self.n_judged else None


def _short(value: Any) -> str:
    """Format a value of metadata. Long texts are cut, because every card repeats them."""
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= METADATA_LENGTH else text[: METADATA_LENGTH - 1] + "…"


def _share(counts: Counter[int], number: int) -> float | None:
    total = counts.total()
    return counts[number] / total if total else None


def bars(rows: Iterable[dict[str, Any]]) -> list[Bar]:
    """Return bars of the parameters in model order; if there are many, the largest and one bar for the others."""
    found = [Bar(row["parameter"], row["energy"]) for row in rows]
    if len(found) <= PARAMETERS_SHOWN:
        return found
    kept = sorted(found, key=lambda bar: -bar.energy)[: PARAMETERS_SHOWN - 1]
    others = [bar for bar in found if bar not in kept]
    return [bar for bar in found if bar in kept] + [
        Bar(f"{len(others)} other parameters", sum(bar.energy for bar in others), of_others=True)
    ]


def _grouped(table: Any) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        groups.setdefault(row["component"], []).append(row)
    return groups
