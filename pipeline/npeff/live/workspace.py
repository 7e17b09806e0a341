"""The pages with fixed queries, made from what is kept in memory of the run's present state."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

import numpy as np

from npeff.errors import without_values
from npeff.live.component_map import METHODS, can_be_drawn, component_map
from npeff.live.histogram import histogram
from npeff.live.overview import chosen, columns, common_prefix
from npeff.live.pages import TEXT, Page, View
from npeff.live.queries import forms, result, state_of, whole
from npeff.live.snapshot import Snapshot
from npeff.live.templates import page
from npeff.query.coefficients import runs_of
from npeff.query.components import ComponentStore
from npeff.query.errors import QueryError
from npeff.reports.cards import Bar, Card, bars
from npeff.storage.location import is_remote
from npeff.store.annotations import Annotation, write_annotations

_REMOTE_STATE_S = 10
"""Time in seconds after which the state of a run in a bucket is read again."""
_NEIGHBOURS_SHOWN = 12
_PNG = b"\x89PNG\r\n\x1a\n"


class Workspace:
    """The pages of one run. They can be made from several threads, one at a time.

    Args:
        view: What is served.
        key: The key that a form of this server contains.
    """

    def __init__(self, view: View, key: str) -> None:
        self._view, self._key, self._lock = view, key, threading.Lock()
        self._snapshot: Snapshot | None = None
        self._checked = -math.inf

    @contextmanager
    def now(self) -> Iterator[Snapshot]:
        """Yield the present state of the run. Arrow's readers cannot be used by two threads at the same time."""
        with self._lock:
            known = self._snapshot
            recently = time.monotonic() < self._checked + _REMOTE_STATE_S
            if known is not None and recently and is_remote(known.store.run_dir):
                yield known
                return
            store = ComponentStore.open(self._view.run_dir, self._view.factorization)
            state, self._checked = state_of(store, annotations=False), time.monotonic()
            if known is None or known.state != state:
                known = self._snapshot = Snapshot(store, state, self._view.top_examples)
            elif store.annotations != known.store.annotations:
                known = self._snapshot = known.renamed(store)
            yield known

    def warm(self) -> None:
        """Read what the pages show, so that the first of them does not wait for it."""
        try:
            with self.now() as snapshot:
                if can_be_drawn(len(snapshot.cards)):
                    for of in snapshot.similarities:
                        for by in METHODS:
                            snapshot.places(of, by)
        except QueryError:
            return  # a page tells it

    def overview(self, asked: dict[str, str]) -> Page:
        """Return the table and the map of the components.

        Args:
            asked: ``q``: words to search for; ``sort`` and ``order`` of the table; ``of`` and ``by`` of the map.
        """
        with self.now() as snapshot:
            known = {column.key: column for column in columns(snapshot)}
            column = known.get(asked.get("sort", ""), known["component"])
            order = asked["order"] if asked.get("order") in ("up", "down") else column.first
            cards = chosen(snapshot, asked.get("q", ""), column, order)
            of, by = asked.get("of", ""), asked.get("by", "")
            drawable = can_be_drawn(len(snapshot.cards))
            of = of if drawable and of in snapshot.similarities else "directions"
            by = by if by in METHODS else "pca"
            labels = [self._label(card) for card in cards]
            return page(
                "overview.html.j2",
                view=self._view,
                s=snapshot.summary,
                n_components=len(snapshot.cards),
                columns=list(known.values()),
                cards=cards,
                q=asked.get("q", ""),
                sort=column.key,
                order=order,
                of=of,
                by=by,
                map=component_map(snapshot.places(of, by), cards, labels) if drawable else None,
                maps=list(snapshot.similarities) if drawable else [],
                address=_address,
                prefix=common_prefix(snapshot),
            )

    def component(self, asked: dict[str, str]) -> Page:
        """Return the page of a component."""
        with self.now() as snapshot:
            number, cards = whole(asked, "component"), snapshot.cards
            if number >= len(cards):
                raise QueryError(f"there is no component {number}: this run has {len(cards)} components")
            store, card = snapshot.store, cards[number]
            values = [run.coefficients for run in runs_of(store.tables, number)]
            listed = card.examples + card.contrast
            return page(
                "component.html.j2",
                styled=True,
                view=self._view,
                key=self._key if self._view.edit else "",
                card=card,
                previous=cards[number - 1] if number else None,
                following=cards[number + 1] if number + 1 < len(cards) else None,
                pictured={each.image.name: each.example for each in listed if each.image},
                histogram=histogram(np.concatenate([np.empty(0), *values]), store.tables.n_rows("examples")),
                layers=self._layers(store, card),
                lazy=False,
                scores=snapshot.scores,
                run_dir=store.run.argument,
                **snapshot.card_variables,
            )

    def annotate(self, component: int, name: str, note: str) -> None:
        """Store the name and the note of a component. Raises `StoreError` if they cannot be stored."""
        with self._lock:
            store = ComponentStore.open(self._view.run_dir, self._view.factorization)
            write_annotations(store.run, {component: Annotation(name, note)})
            self._checked = -math.inf

    def example(self, asked: dict[str, str]) -> Page:
        """Return the page of an example."""
        with self.now() as snapshot:
            store = snapshot.store
            number = store.example_number(asked["example"])
            components, near = store.example(number), snapshot.nearest(None, _NEIGHBOURS_SHOWN, number)
            examples = [number, *near["example"].to_pylist()]
            (row,) = store.describe_examples([number]).to_pylist()
            return page(
                "example.html.j2",
                styled=True,
                view=self._view,
                row=row,
                metadata={name: row[name] for name in store.metadata_columns()},
                components=components.to_pylist(),
                cards=snapshot.cards,
                neighbours=near.to_pylist(),
                pictured=pictured(store, examples),
            )

    def question(self, question: str, asked: dict[str, str]) -> Page:
        """Return the page of a query without SQL."""
        try:
            with self.now() as snapshot:
                return result(snapshot.store, self._view, question, asked)
        except QueryError as error:
            problem = without_values(str(error))
            return forms(self._view, question, asked, HTTPStatus.BAD_REQUEST, problem=problem)

    def image(self, asked: dict[str, str]) -> Page:
        """Return the picture of an example."""
        with self.now() as snapshot:
            number = whole(asked, "example")
            tables = snapshot.store.tables
            groups = tables.groups_with("examples", "example", [number])
            rows = tables.read_groups("examples", groups, ("example", "image"))
            found = np.flatnonzero(rows["example"].to_numpy() == number).tolist()
            image = rows["image"][found[0]].as_py() if found else None
            if image is None or not image.startswith(_PNG):
                return Page(HTTPStatus.NOT_FOUND, TEXT, b"This example has no image.\n")
            return Page(HTTPStatus.OK, "image/png", image)

    def _label(self, card: Card) -> str:
        """Return what is said about a component beside its number: its name, or the most common label."""
        top = card.top_label
        if card.annotation.name:
            return card.annotation.name
        return top.name if top is not None and card.examples else ""

    def _layers(self, store: ComponentStore, card: Card) -> list[Bar]:
        """Return the energy of a direction by layer, if it has one and its parameters do not tell it already."""
        if not card.energy:
            return []
        rows = store.layer_energy(card.component, by="layer").to_pylist()
        return bars({"parameter": row["layer"], "energy": row["energy"]} for row in rows)


def _address(path: str = "/", **parameters: Any) -> str:
    """Return an address with those parameters that have a value."""
    given = {name: value for name, value in parameters.items() if value not in ("", None)}
    return f"{path}?{urlencode(given)}" if given else path


def pictured(store: ComponentStore, examples: list[int]) -> set[int]:
    """Return those examples that have a picture."""
    tables = store.tables
    if "image" not in tables.columns("examples"):
        return set()
    groups = tables.groups_with("examples", "example", examples)
    rows = tables.read_groups("examples", groups, ("example", "image"))
    wanted = set(examples)
    numbers, has_image = rows["example"].to_pylist(), rows["image"].is_valid().to_pylist()
    return {number for number, has in zip(numbers, has_image, strict=True) if has and number in wanted}
