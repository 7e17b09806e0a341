"""Rows of a table with several predictions. A prediction is an example, or all predictions of a row are one example.

Legend: B batch, T positions, C classes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
from npeff.tasks.tables import example_table

Granularity = Literal["sequences", "positions"]

_SHOWN_TOKENS = 24
"""Number of tokens that are displayed before the marked token."""


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
        places = [np.flatnonzero(row != IGNORED) for row in targets]
        if targets and not any(map(len, places)):
            raise TaskError(f"{options.data}: no row has a prediction: check its columns, or raise max_length")
        if options.examples == "sequences":
            return cls(targets, np.arange(len(targets)), None)
        rows = np.repeat(np.arange(len(targets)), list(map(len, places)))
        return cls(targets, rows, np.concatenate([np.zeros(0, np.int64), *places]))

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return ``targets`` (B, T), or ``places`` (B,) of single predictions."""
        if self.places is None:
            return {"targets": padded([self.targets[self.rows[index]] for index in indices], IGNORED)}
        return {"places": torch.from_numpy(self.places[list(indices)])}

    def table(
        self, rows: pa.Table, text: Sequence[str], numbers: Sequence[int], used: Collection[str], **shown: Sequence[Any]
    ) -> pa.Table:
        """Return the table of examples.

        Args:
            rows: Rows of the data.
            text: Text of each example.
            numbers: Number of each example's prediction for its id; not used if examples are rows.
            used: Columns to leave out, because the text contains their values.
            shown: Further columns, one entry per example.
        """
        columns: dict[str, Any] = {"text": pa.array(text, pa.string())}
        if self.places is None:
            return example_table(rows, [None] * len(self), columns, used)
        rows = rows.take(pa.array(self.rows))
        names = rows["id"].to_pylist()
        ids = pa.array([f"{name}:{number}" for name, number in zip(names, numbers, strict=True)], pa.string())
        classes = [int(self.targets[row][place]) for row, place in zip(self.rows, self.places, strict=True)]
        labels = [None if label == UNKNOWN else label for label in classes]
        columns |= {"row": rows["id"], "position": pa.array(numbers, pa.int64()), **shown}
        return example_table(rows.set_column(0, "id", ids), labels, columns, used)


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
    space = " " if before and token.startswith(" ") else ""
    shown = token.strip(" ").replace("\n", "\\n")
    return f"{'… ' if start else ''}{before}{space}[{shown}]", shown
