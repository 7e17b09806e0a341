"""Token ids of texts, made once, and batches of them.

Batches are padded on the right, whatever the tokenizer would do: positions are then counted from a text's own first
token, so that no model needs to be told them, and what follows a causal model's tokens cannot change its logits.

Legend: B batch, T tokens of the longest example in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from npeff.tasks.base import TaskError, Token
from npeff.tasks.huggingface.pretrained import PretrainedOptions

_TEXTS_AT_ONCE = 1024
"""Texts tokenized in one call: enough for the tokenizer's threads, few enough for its lists of Python integers."""

Side = Literal["left", "right"]
NoteT = TypeVar("NoteT")


@dataclass(frozen=True, kw_only=True)
class TextOptions(PretrainedOptions):
    """Options of every task that reads texts."""

    max_length: int = 128
    """Tokens after which a text is cut."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 1:
            raise TaskError(f"max_length must be at least 1, not {self.max_length}")


@dataclass(frozen=True)
class Tokens:
    """What a tokenizer made of N texts, or pairs of texts."""

    inputs: Mapping[str, Sequence[np.ndarray]]
    """``input_ids`` and, where the tokenizer gives them, ``token_type_ids``: N arrays each."""
    padding: Mapping[str, int]
    """Value of each of these where there is no token."""

    @property
    def ids(self) -> Sequence[np.ndarray]:
        return self.inputs["input_ids"]

    def lengths(self) -> list[int]:
        """Number of tokens of each text."""
        return [len(row) for row in self.ids]

    def batch(
        self, indices: Sequence[int], side: Side = "right", stop: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Padded inputs (B, T) of these texts and their attention mask; of each only its first `stop` tokens."""
        ends = [None] * len(indices) if stop is None else stop
        rows = {
            name: [values[index][:end] for index, end in zip(indices, ends, strict=True)]
            for name, values in self.inputs.items()
        }
        mask = [np.ones(len(row), np.int64) for row in rows["input_ids"]]
        found = {name: padded(values, self.padding[name], side) for name, values in rows.items()}
        return found | {"attention_mask": padded(mask, 0, side)}


def padded(rows: Sequence[np.ndarray], value: int, side: Side = "right") -> Tensor:
    """Rows of integers as one int64 tensor (B, T), filled up with `value`."""
    longest = max(map(len, rows), default=0)
    filled = torch.full((len(rows), longest), value, dtype=torch.int64)
    for target, row in zip(filled, rows, strict=True):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        target[place] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return filled


def tokenize(
    tokenizer: Any,
    pad_token_id: int,
    options: TextOptions,
    ids: Sequence[str],
    *texts: Sequence[Any],
    note: Callable[[int, Any], NoteT] | None = None,
    target: bool = False,
    **further: Any,
) -> tuple[Tokens, list[NoteT]]:
    """Tokens of N texts, or of N pairs where there are two sequences of texts.

    Args:
        ids: of the texts, to name one that has no tokens.
        note: of a text's number and its `tokenizers.Encoding`, what else is to be kept of it.
        target: the texts are what a sequence-to-sequence model writes.
        further: arguments of the tokenizer.

    Returns:
        The tokens, and what `note` gave for each text.

    Raises:
        TaskError: a text has no tokens, or the tokenizer keeps no encodings that could be noted.
    """
    inputs: dict[str, list[np.ndarray]] = {"input_ids": []}
    notes: list[NoteT] = []
    for start in range(0, len(ids), _TEXTS_AT_ONCE):
        chosen = [list(column[start : start + _TEXTS_AT_ONCE]) for column in texts]
        given: tuple[list[list[Any]], dict[str, Any]] = ([], {"text_target": chosen[0]}) if target else (chosen, {})
        encoded = tokenizer(*given[0], **given[1], truncation=True, max_length=options.max_length, **further)
        for name in set(encoded) & {"input_ids", "token_type_ids"}:
            inputs.setdefault(name, []).extend(np.asarray(row, np.int32) for row in encoded[name])
        if note is not None and encoded.encodings is None:
            raise TaskError(f"the tokenizer of {options.model!r} cannot say what its tokens stand for: use a fast one")
        if note is not None:
            notes += [note(start + number, encoding) for number, encoding in enumerate(encoded.encodings)]
    for example, row in zip(ids, inputs["input_ids"], strict=True):
        if not len(row):
            raise TaskError(f"{options.data}: the text of row {example!r} has no tokens: leave the row out with filter")
    return Tokens(inputs, {"input_ids": pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}), notes


def placed_tokens(
    tokenizer: Any, options: TextOptions, *texts: Any, starts: Sequence[int], **further: Any
) -> list[Token]:
    """The tokens that `tokenize` makes of one text, or of a pair, with their places where the tokenizer is a fast one.

    Args:
        texts: one or two of them; the one, in words, with ``is_split_into_words``.
        starts: where each text, or each word, begins in what people read.
        further: arguments of the tokenizer.
    """
    encoded = tokenizer(*texts, truncation=True, max_length=options.max_length, **further)
    if encoded.encodings is None:
        return [Token(piece) for piece in tokenizer.convert_ids_to_tokens(encoded["input_ids"])]
    (encoding,) = encoded.encodings
    words = further.get("is_split_into_words", False)
    owners, parts = (encoding.word_ids, texts[0]) if words else (encoding.sequence_ids, texts)
    tokens = []
    for piece, (start, stop), owner in zip(encoding.tokens, encoding.offsets, owners, strict=True):
        if owner is None or start == stop:  # a token that stands for no text
            tokens.append(Token(piece))
        else:
            tokens.append(Token(parts[owner][start:stop], starts[owner] + start, starts[owner] + stop))
    return tokens


def pad_token_id(tokenizer: Any, config: Any) -> int:
    """The token that fills up a batch. It is masked, so any will do, but models that classify at the last token take
    it for that of the padding: the model's or tokenizer's own, or else the end of a text."""
    candidates = (tokenizer.pad_token_id, config.get_text_config().pad_token_id, tokenizer.eos_token_id)
    return next((int(candidate) for candidate in candidates if candidate is not None), 0)


def padding_side(config: Any) -> Side:
    """Right, but for models that classify at the last position (XLNet), which count positions from each other."""
    return "left" if getattr(config, "summary_type", None) == "last" else "right"
