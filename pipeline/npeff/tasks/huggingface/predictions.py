"""Rows of a table with several predictions. A prediction is an example, or all predictions of a row are one example.

Legend: B batch, T positions, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from npeff.tasks.base import IGNORED, UNKNOWN
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.options import PredictionOptions
from npeff.tasks.huggingface.tokens import padded
from npeff.tasks.prepared import slices
from npeff.tasks.tables import example_parts, example_table

Granularity = Literal["sequences", "positions"]

_EXAMPLES_AT_ONCE = 1024
"""Number of single predictions whose texts are in memory at once."""
_SHOWN_TOKENS = 24
"""Number of tokens that are displayed before the marked token."""
_SEED = 0
"""Seed of the draws of `positions_per_row`. They are the same for every seed of a run, so that runs can be compared."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of each example."""

    targets: Sequence[np.ndarray]
    """Class of the prediction at each position of each row; IGNORED if the position has no prediction."""
    rows: np.ndarray
    """Row of each example."""
    places: np.ndarray | None
    """Position of each example's prediction; None if an example is a row with all its predictions."""

    @classmethod
    def of(cls, targets: Sequence[np.ndarray], options: PredictionOptions) -> Predictions:
        """Create the predictions. Raises TaskError if there are rows but no predictions."""
        if options.examples == "sequences":
            made = len(targets) == 0 or any((row != IGNORED).any() for row in targets)
            rows, places = np.arange(len(targets)), None
        else:
            counts, parts = np.zeros(len(targets), np.int64), [np.zeros(0, np.int64)]
            for row, classes in enumerate(targets):
                parts.append(_drawn(np.flatnonzero(classes != IGNORED), options.positions_per_row, row))
                counts[row] = len(parts[-1])
            rows, places = np.repeat(np.arange(len(targets)), counts), np.concatenate(parts)
            made = len(targets) == 0 or len(places) > 0
        if not made:
            raise TaskError(f"{options.data}: no row has a prediction: check its columns, or raise max_length")
        return cls(targets, rows, places)

    def __len__(self) -> int:
        return len(self.rows)

    def position(self, example: int, number: int) -> int:
        """Return the position of a prediction, by its number among the predictions of the example."""
        if self.places is not None:
            return int(self.places[example])
        return int(np.flatnonzero(self.targets[self.rows[example]] != IGNORED)[number])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return ``targets`` (B, T), or ``places`` (B,) of single predictions."""
        if self.places is None:
            return {"targets": padded([self.targets[self.rows[index]] for index in indices], IGNORED)}
        return {"places": torch.from_numpy(self.places[list(indices)])}

    def parts(
        self, rows: pa.Table, shown: Callable[[slice], Mapping[str, Any]], used: Collection[str]
    ) -> Iterator[pa.Table]:
        """Yield the table of examples in parts.

        Args:
            rows: Rows of the data.
            shown: Function that returns further columns of some examples: ``text``, and ``position``, the number of
                each example's prediction for its id, unless examples are rows.
            used: Columns to leave out, because the text contains their values.
        """
        if self.places is None:
            yield from example_parts(rows, pa.nulls(len(self), pa.int64()), shown, used)
            return
        for part in slices(len(self), _EXAMPLES_AT_ONCE):
            yield self._part(part, rows, shown(part), used)

    def _part(self, part: slice, rows: pa.Table, shown: Mapping[str, Any], used: Collection[str]) -> pa.Table:
        """Return the table of some single predictions."""
        assert self.places is not None
        chosen, numbers = self.rows[part], shown["position"].to_pylist()
        first, last = (int(chosen[0]), int(chosen[-1])) if len(chosen) else (0, 0)
        rows = rows[first : last + 1].take(pa.array(chosen - first))  # not of the whole table, which it would join
        ids = [f"{name}:{number}" for name, number in zip(rows["id"].to_pylist(), numbers, strict=True)]
        classes = [int(self.targets[row][place]) for row, place in zip(chosen, self.places[part], strict=True)]
        labels = [None if label == UNKNOWN else label for label in classes]
        columns = {"text": shown["text"], "row": rows["id"], "position": shown["position"], **shown}
        return example_table(rows.set_column(0, "id", pa.array(ids, pa.string())), labels, columns, used)


def _drawn(places: np.ndarray, most: int | None, row: int) -> np.ndarray:
    """Return at most this number of the places of a row, in order. The draw depends on the number of the row only."""
    if most is None or len(places) <= most:
        return places
    return np.sort(np.random.default_rng([_SEED, row]).choice(places, most, replace=False))


def at_places(logits_BTC: Tensor, batch: Mapping[str, Tensor], n_positions: int) -> Tensor:
    """Return the logits (B, T, C), or (B, C) at the ``places`` of a batch of single predictions.

    Raises:
        TaskError: The model does not return logits at exactly `n_positions` positions, those of the tokens.
    """
    if logits_BTC.shape[1] != n_positions:
        raise TaskError(
            f"the model returns logits at {logits_BTC.shape[1]} positions for {n_positions} tokens: use a model whose "
            "positions are those of the tokenizer"
        )
    if "places" not in batch:
        return logits_BTC
    return logits_BTC[torch.arange(len(logits_BTC), device=logits_BTC.device), batch["places"]]


def marked(tokenizer: Any, token_ids: np.ndarray, place: int) -> tuple[str, str]:
    """Return the text up to a token, with the token in brackets, and the text of the token."""
    start = max(0, place - _SHOWN_TOKENS)
    before, with_token, alone = (
        tokenizer.decode(token_ids[part].tolist(), clean_up_tokenization_spaces=False)
        for part in (slice(start, place), slice(start, place + 1), slice(place, place + 1))
    )
    token = with_token.removeprefix(before) if with_token.startswith(before) else f" {alone}"
    word = token.strip(" ")
    space = " " if before and word and token.startswith(" ") else ""
    shown = (word or token).replace("\n", "\\n")
    return f"{'… ' if start else ''}{before}{space}[{shown}]", shown
