"""The examples of the stage `inputs`: which are explained, and on which attributions are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from npeff.runs.config_input_sections import InputsConfig
from npeff.runs.config_reading import ConfigError
from npeff.runs.directory import RunDirectory
from npeff.store.splits import Splits
from npeff.store.tables import read_table

_DONORS = 64
"""Number of the examples whose inputs replace those of tested examples."""


@dataclass(frozen=True)
class Block:
    """Examples that one call of a worker explains."""

    number: int
    examples: tuple[int, ...]

    def __str__(self) -> str:
        return f"block {self.number} (examples {self.examples[0]} to {self.examples[-1]})"


@dataclass(frozen=True)
class ChosenExamples:
    """Numbers of examples, in ascending order."""

    explained: list[int]
    """All examples whose inputs are explained, with the tested ones."""
    tested: list[int]
    """The examples on which attributions are compared."""
    donors: list[int]
    """Fitted examples whose inputs replace those of tested examples."""
    fitted: NDArray[np.int64]
    """The examples whose inputs have the covariance."""
    labels: pa.ChunkedArray
    """The labels of the explained examples."""

    @classmethod
    def of(cls, run: RunDirectory, options: InputsConfig) -> ChosenExamples:
        """Return the examples that the options choose.

        Raises:
            ConfigError: An explained example has no label, and the options need labels.
        """
        examples = read_table(run.table("examples"), "examples", ["label", "split", "valid"])
        splits, seed = Splits.of(examples), run.config.seed
        fitted, held_out = np.flatnonzero(splits.fit_N), np.flatnonzero(splits.held_out_N)
        valid = np.flatnonzero(examples["valid"].to_numpy())
        tested: set[int] = set()
        if count := options.faithfulness.examples:
            tested = _some(held_out if len(held_out) >= count else valid, count, seed)
        if options.examples == "top":
            explained = _top(run)
        else:
            explained = _some(valid, len(valid) if options.examples == "all" else options.examples, seed)
        numbers = sorted(explained | tested)
        labels = examples["label"].take(pa.array(numbers, pa.int64()))
        _refuse_missing_labels(options, labels)
        donors = _some(fitted, _DONORS, seed) if tested else set()
        return cls(numbers, sorted(tested), sorted(donors), fitted, labels)

    def blocks(self, size: int, tested_size: int, lengths: Sequence[int] | None) -> list[Block]:
        """Return the explained examples in blocks of similar lengths, to reduce padding.

        Args:
            size: Number of examples of a block.
            tested_size: Number of tested examples of a block. They are in blocks of their own, which come first.
            lengths: The length of each explained example; None if all lengths are equal.
        """
        in_order = self.explained
        if lengths is not None:
            length = dict(zip(self.explained, lengths, strict=True))
            in_order = sorted(self.explained, key=length.__getitem__, reverse=True)  # the longest work first
        tested = set(self.tested)
        parts = (
            ([example for example in in_order if example in tested], tested_size),
            ([example for example in in_order if example not in tested], size),
        )
        chosen = [part[start : start + length] for part, length in parts for start in range(0, len(part), length)]
        return [Block(number, tuple(examples)) for number, examples in enumerate(chosen)]


def _some(examples: NDArray[np.int64], count: int, seed: int) -> set[int]:
    """Return so many of the examples, chosen at random, or all if there are fewer."""
    if count < len(examples):
        examples = np.random.default_rng([seed, len(examples)]).choice(examples, count, replace=False)
    return set(examples.tolist())


def _top(run: RunDirectory) -> set[int]:
    """Return the top examples that the report shows."""
    top = read_table(run.table("top_examples"), "top_examples", ["rank", "example"])
    shown = top["rank"].to_numpy() < run.config.report.top_examples
    return set(top["example"].to_numpy()[shown].tolist())


def _refuse_missing_labels(options: InputsConfig, labels: pa.ChunkedArray) -> None:
    needed = [key for key in ("label", "scope") if getattr(options, key) in ("label", "class")]
    if needed and labels.null_count:
        key = needed[0]
        other = {"label": "prediction", "scope": "all"}[key]
        raise ConfigError(
            f"inputs.{key}: {getattr(options, key)} needs labels, and {labels.null_count} of {len(labels)} examples "
            f"have none: set inputs.{key} to {other}, or add labels"
        )
