"""What the pages show of a run in one state. It is read once and kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from npeff.live.component_map import examples_similarity, placed
from npeff.query.components import ComponentStore
from npeff.reports.cards import Card, CardWriter
from npeff.reports.report import card_variables
from npeff.statistics.verdict import Scores, Verdict, scoreboard, verdicts
from npeff.store.annotations import Annotation

_MOST_COEFFICIENTS = 200_000_000
"""Largest number of coefficients from which the similarity of the components' examples is computed."""

_MOST_KEPT = 50_000_000
"""Largest number of coefficients that are kept in memory, 200 MB, to find the nearest examples."""


@dataclass
class Snapshot:
    """A run in one state.

    Attributes:
        store: The store of the run, opened in this state.
        state: A text that differs if the run has changed.
        top_examples: Number of top examples on a card.
    """

    store: ComponentStore
    state: str
    top_examples: int

    def renamed(self, store: ComponentStore) -> Snapshot:
        """Return the same run with other names and notes, which are those of a store that was opened again."""
        known = store.annotations
        found = Snapshot(store, self.state, self.top_examples)
        kept = ("similarities", "_places", "_unit_rows", "verdicts", "scores", "card_variables")
        vars(found).update({name: value for name, value in vars(self).items() if name in kept})
        found.cards = [
            replace(
                card,
                annotation=known.of_component.get(card.component, Annotation()),
                neighbours=[row | {"name": known.name(row["component"])} for row in card.neighbours],
            )
            for card in self.cards
        ]
        return found

    @cached_property
    def cards(self) -> list[Card]:
        """The cards of all components; none if the run is not factorized yet."""
        needed = ("examples", "components", "top_examples")
        if not all(self.store.tables.has(name) for name in needed):
            return []
        return CardWriter(self.store, self.top_examples).cards()

    @cached_property
    def verdicts(self) -> list[Verdict]:
        rows = self.store.table("verification").to_pylist() if self.store.tables.has("verification") else []
        return verdicts(rows)

    @cached_property
    def scores(self) -> list[Scores]:
        return scoreboard(self.verdicts)

    @cached_property
    def card_variables(self) -> dict[str, Any]:
        return card_variables(self.store, self.cards, self.verdicts)

    @cached_property
    def summary(self) -> dict[str, Any]:
        return self.store.summary()

    @cached_property
    def words(self) -> list[str]:
        """For each component, all words that a search finds, in lower case."""
        return [" ".join(_words(card)).lower() for card in self.cards]

    @cached_property
    def similarities(self) -> dict[str, NDArray[np.float64]]:
        """Similarities (K, K) of the components, by what is compared."""
        found = {"directions": np.abs(self.store.cosines)}
        if self.store.stored_coefficients.size <= _MOST_COEFFICIENTS:
            found["examples"] = examples_similarity(self.store.stored_coefficients)
        return found

    def nearest(self, weights_K: NDArray[np.float64] | None, n: int, example: int | None = None) -> pa.Table:
        """Return the `n` examples whose coefficients are most similar, as `ComponentStore.nearest` does.

        Args:
            weights_K: The coefficients (K,); None for those of an example of the run.
            n: Number of examples.
            example: This example, which is left out.
        """
        rows_NK = self._unit_rows
        if rows_NK is None:
            return self.store.nearest(weights_K, n) if weights_K is not None else self.store.neighbours(example or 0, n)
        unit_K = rows_NK[example] if weights_K is None else weights_K / np.linalg.norm(weights_K)
        cosines_N = rows_NK @ unit_K.astype(np.float32)
        if example is not None:
            cosines_N[example] = 0
        found = np.argpartition(-cosines_N, min(n, len(cosines_N) - 1))[:n]
        found = found[cosines_N[found] > 0]
        found = found[np.lexsort((found, -cosines_N[found]))]
        described = self.store.describe_examples(found.tolist())
        return described.add_column(0, "cosine", pa.array(cosines_N[found], pa.float64()))

    @cached_property
    def _unit_rows(self) -> NDArray[np.float32] | None:
        """The coefficients (N, K) divided by the norms of their rows, zero for invalid examples; None if too many."""
        stored = self.store.stored_coefficients
        if stored.size > _MOST_KEPT:
            return None
        rows_NK = np.nan_to_num(np.asarray(stored[:], np.float32))
        lengths_N1 = np.linalg.norm(rows_NK, axis=1, keepdims=True)
        unit_NK: NDArray[np.float32] = np.divide(rows_NK, np.where(lengths_N1 > 0, lengths_N1, 1), dtype=np.float32)
        return unit_NK

    def members(self, split: str) -> NDArray[np.bool_]:
        """Return the mask (N,) of the valid examples of a split."""
        table = self.store.tables.read("examples", ["valid", "split"])
        members_N: NDArray[np.bool_] = pc.and_(table["valid"], pc.equal(table["split"], split)).to_numpy()
        return members_N

    def places(self, of: str, by: str) -> NDArray[np.float64]:
        """Return the places (K, 2) of the components on the map.

        Args:
            of: What is compared, a name of `similarities`.
            by: The method, one of `npeff.live.component_map.METHODS`.
        """
        if (of, by) not in self._places:
            self._places[of, by] = placed(self.similarities[of], by)
        return self._places[of, by]

    @cached_property
    def _places(self) -> dict[tuple[str, str], NDArray[np.float64]]:
        return {}


def _words(card: Card) -> Iterator[str]:
    yield f"component {card.component}"
    yield from (text for text in (card.annotation.name, card.annotation.note) if text)
    for example in card.examples + card.contrast:
        yield from (part for part in (example.id, example.label, example.prediction, example.text) if part)
        yield from example.metadata
    yield from (item.value for item in card.common.values + card.common.words)
    yield from (bar.name for bar in card.energy)
    yield from (share.name for share in card.mix[:1])
