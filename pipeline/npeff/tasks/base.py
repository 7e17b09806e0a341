"""What a user supplies: a model, examples, and how the one turns the other into logits.

A task is constructed from the run file's ``task.options``, again in every worker, and must come out the same each time.
Work that should happen once (training, tokenizing) goes into `Task.prepare`, which one worker calls before any other
loads the task, and which keeps its results in the run's task folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn

from npeff.errors import ItemError

IGNORED = -100
"""In `Task.targets`: no prediction is made at this position."""
UNKNOWN = -1
"""In `Task.targets`: a prediction is made at this position, and its class is not known."""


class TaskError(ItemError, ValueError):
    """A task that cannot be used as it was asked for; the message says what to change."""


class Token(NamedTuple):
    """What is at one position of an example, for people to look at."""

    text: str | None
    start: int | None = None
    """Where it begins in the example's ``text`` in the table, in characters; None for what is not in there."""
    stop: int | None = None
    """Where it ends: ``text[start:stop]``."""


class Examples(ABC):
    """N examples in a fixed order, numbered from 0."""

    class_names: Sequence[str]
    """Names of the C classes, in the order of the logits; empty where they have none (a vocabulary)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Any:
        """Tensors of these examples, collated, on the CPU: a tensor or a dict, list or tuple of tensors."""

    @abstractmethod
    def table(self) -> pa.Table:
        """One row per example, in order: ``id`` (string) and ``label`` (int64, null where unknown), for people to look
        at ``text`` (string) or ``image`` (PNG bytes), and any further columns of scalars to query by."""

    def lengths(self) -> Sequence[int] | None:
        """Size of each example, such as its number of tokens: examples of like size are put into one batch. None where
        all have one size."""
        return None

    def tokens(self, indices: Sequence[int]) -> list[list[Token]] | None:
        """What is at each position of these examples, in the order that the layers' outputs have them after the
        examples, as in a batch of that one example. None where examples have no one axis of positions that means
        something to people: evidence is then not split over positions."""
        return None


def placed_words(words: Sequence[str], start: int = 0) -> list[Token]:
    """Words that the text has with a space between them, from this character on."""
    tokens = []
    for word in words:
        tokens.append(Token(word, start, start + len(word)))
        start += len(word) + 1
    return tokens


class Task(ABC):
    """One model on one data set. Subclasses take their options as keyword arguments of ``__init__``."""

    def prepare(self, cache: Path) -> None:  # noqa: B027  (most tasks have nothing to prepare)
        """Do what must be done once, keeping its results in ``cache``; must be safe to repeat after a crash."""

    @abstractmethod
    def model(self, cache: Path) -> nn.Module:
        """The trained model, θ, on the CPU."""

    @abstractmethod
    def examples(self, cache: Path) -> Examples:
        """The examples x_1 … x_N that get Fishers; preferably none that the model was trained on."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """z(x; θ) of a batch that `Examples.batch` made, moved to the model's device: (B, C), or (B, T, C) where one
        example makes several predictions (a sequence). The logits at t are those of the prediction `targets` has at t:
        a causal language model's are shifted here."""

    def targets(self, batch: Any) -> Tensor | None:
        """Class of each prediction, int64 (B, T): `IGNORED` where none is made, `UNKNOWN` where its class is not known.
        It says which positions of (B, T, C) logits count. None: each example makes one prediction, whose class is the
        table's ``label``."""
        return None


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with every tensor in it on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
