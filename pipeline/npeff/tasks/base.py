"""The interface of a task, which the user implements: a model, examples, and the logits of the model on the examples.

Every worker constructs the task from the run file's ``task.options``, and each construction must give the same task.
Work that is done once, such as training or tokenization, belongs in `Task.prepare`. One worker calls `Task.prepare`
before any other worker loads the task. Its results are stored in the run's task folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

IGNORED = -100
"""Value in `Task.targets` of a position without a prediction."""
UNKNOWN = -1
"""Value in `Task.targets` of a position with a prediction whose class is not known."""


class Token(NamedTuple):
    """The token at one position of an example, for display."""

    text: str | None
    start: int | None = None
    """First character of the token in the example's ``text`` in the table; None if the token is not in the text."""
    stop: int | None = None
    """End of the token in the text: the token is ``text[start:stop]``."""


class Examples(ABC):
    """N examples in a fixed order, numbered from 0."""

    class_names: Sequence[str]
    """Names of the C classes, in the order of the logits; empty if the classes have no names (a vocabulary)."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Any:
        """Return the collated tensors of some examples on the CPU: a tensor, or a dict, list or tuple of tensors."""

    @abstractmethod
    def table(self) -> pa.Table:
        """Return the table of examples, one row per example, in order.

        The columns are ``id`` (string), ``label`` (int64, null if unknown), optionally ``text`` (string) or ``image``
        (PNG bytes) for display, and any scalar columns for queries.
        """

    def lengths(self) -> Sequence[int] | NDArray[np.integer] | None:
        """Return the size of each example, such as its number of tokens, or None if all sizes are equal.

        Examples of similar size are put into the same batch.
        """
        return None

    def tokens(self, indices: Sequence[int]) -> list[list[Token]] | None:
        """Return the tokens at the positions of some examples.

        The order of the positions is that of the position axis of the layers' outputs, in a batch of this one example.
        Return None if the examples have no meaningful position axis; evidence is then not split over positions.
        """
        return None

    def input_tokens(self, indices: Sequence[int]) -> list[list[Token]] | None:
        """Return the tokens at the positions of the inputs (`Task.inputs`) of some examples, for display.

        By default, they are those of `tokens`. None if the positions are not tokens.
        """
        return self.tokens(indices)

    def class_texts(self, classes: Sequence[int]) -> list[str | None] | None:
        """Return the texts of classes that have no `class_names`, such as the tokens of a vocabulary, for display.

        An entry is None if a class has no text. Return None if no class has one.
        """
        return None

    def prediction_texts(self, predictions: Sequence[tuple[int, int]]) -> list[str | None] | None:
        """Return the texts of single predictions, for display: what precedes a predicted token, and it in brackets.

        An entry is None if a prediction has no text. Return None if no prediction has one.

        Args:
            predictions: Numbers of examples, each with the number of one of its predictions. The predictions of an
                example are numbered from 0 in the order of their positions.
        """
        return None

    def stimulus(self, parameter: str, s: Sequence[float], indices: Sequence[int]) -> Any | None:
        """Return a batch of some examples with changed values of a stimulus parameter, for `npeff scale`.

        The tensors are those of `batch`, with the parameter moved from its first level, s = 0, to its last, s = 1. All
        else of an example stays as it is, such as its noise, so that its inputs are a smooth function of s.

        Args:
            parameter: Name of the parameter, such as the spatial frequency.
            s: The position of each example between the levels, from 0 to 1.
            indices: Numbers of the examples, as many as positions. They may repeat.

        Returns:
            The batch; None if the examples have no such parameter.
        """
        return None

    def stimulus_information(self, parameter: str, s: Sequence[float]) -> Sequence[float] | None:
        """Return the Fisher information about s of the stimuli's own distribution, that of an ideal observer.

        `npeff scale` compares it with the model (``scale.space: gaussian``). Return None if it is not known.

        Args:
            parameter: Name of the parameter.
            s: Positions between the levels, from 0 to 1.
        """
        return None


def placed_words(words: Sequence[str], start: int = 0) -> list[Token]:
    """Return the tokens of words that are separated by single spaces in a text, from character ``start``."""
    tokens = []
    for word in words:
        tokens.append(Token(word, start, start + len(word)))
        start += len(word) + 1
    return tokens


@dataclass(frozen=True)
class Inputs:
    """The real-valued inputs of a batch of B examples, and the logits of the model as a function of them.

    An example has inputs at one or more positions: the pixels of an image, the tokens of a text, or the columns of a
    table. A position has one or more features: the channels of a pixel, or the entries of a token's embedding.
    """

    values: Tensor
    """(B, ...), floating point: the inputs."""
    logits: Callable[[Tensor], Tensor]
    """Function of values of the shape of `values`. It returns what `Task.logits` returns for the batch."""
    positions: tuple[int, ...] | None = None
    """Axes of `values` that number the positions: (2, 3) for images (B, C, H, W), (1,) for embedded texts (B, T, D).
    The other axes, except axis 0, number the features. With None, every entry is a position with one feature."""
    exchangeable: bool = False
    """Whether all positions have the same distribution, and examples may have different numbers of positions, as texts
    do. The covariance is then one of the features of a position."""
    mask: Tensor | None = None
    """(B, P) for P positions in row-major order, bool: False where a position is not an input of the example, such as
    padding and special tokens. These values are never changed, and have no share of the information."""
    present: Tensor | None = None
    """(B, P), bool: False where a position is padding, so that the example has no such position; None if no position
    is padding. The positions of an example where it is True are, in order, those of `Examples.input_tokens`."""
    names: Sequence[str] = ()
    """Names of the P positions, such as the columns of a table, if they have names."""
    groups: Sequence[str] = ()
    """Names of groups of positions, such as the modalities or the segments of a pair of texts."""
    group_of: Tensor | None = None
    """(P,) or (B, P), int64: the number of the group of each position, -1 for a position without a group."""


class Task(ABC):
    """A model on a data set. Subclasses take their options as keyword arguments of ``__init__``."""

    def prepare(self, cache: Path) -> None:  # noqa: B027  (most tasks have nothing to prepare)
        """Do work that is done once, and store its results in ``cache``. It must be safe to repeat after a crash."""

    @abstractmethod
    def model(self, cache: Path) -> nn.Module:
        """Return the trained model, with parameters θ, on the CPU."""

    def skeleton(self, cache: Path) -> nn.Module:
        """Return a model with the modules, parameters and buffers of `model`, whose values do not matter.

        If a model is divided among several processes (``executor.devices_per_model``), only the first of them calls
        `model`, and the others receive their parts of its values. A skeleton on torch's device "meta" needs no memory.
        By default, it is the model itself, so that every process holds it for a moment.
        """
        return self.model(cache)

    @abstractmethod
    def examples(self, cache: Path) -> Examples:
        """Return the examples x_1 … x_N whose Fishers are computed, preferably not training examples of the model."""

    @abstractmethod
    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the logits z(x; θ) of a batch.

        Args:
            model: The model.
            batch: A batch of `Examples.batch`, on the device of the model.

        Returns:
            Logits (B, C), or (B, T, C) if an example has several predictions (a sequence). The logits at position t
            belong to the target at position t of `targets`, so the logits of a causal language model must be shifted.
        """

    def targets(self, batch: Any) -> Tensor | None:
        """Return the class of each prediction, int64 (B, T), or None.

        `IGNORED` marks a position without a prediction, and `UNKNOWN` a prediction whose class is not known. The
        targets determine which positions of (B, T, C) logits are used. None means that each example has one
        prediction, whose class is the ``label`` in the table.
        """
        return None

    def inputs(self, model: nn.Module, batch: Any) -> Inputs | None:
        """Return the real-valued inputs of a batch, for `npeff inputs` and `npeff scale`; None if there are none.

        By default, a batch that is one floating-point tensor is the input. Its positions are the pixels of a batch
        (B, C, H, W), and the single entries of any other batch.

        Args:
            model: The model.
            batch: A batch of `Examples.batch`, on the device of the model.
        """
        if not (isinstance(batch, Tensor) and batch.is_floating_point() and batch.dim() > 1):
            return None
        return Inputs(batch, lambda values: self.logits(model, values), (2, 3) if batch.dim() == 4 else None)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with all its tensors on ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):  # a named tuple
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
