"""Token ids of texts, which are computed once, and batches of token ids.

Batches are padded on the right, independent of the tokenizer. Positions are then counted from the first token of a
text, so no model needs explicit positions, and padding cannot change the logits of a causal model.

Legend: B batch, T tokens of the longest example in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from npeff.tasks.base import Token
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.known_text import KnownText
from npeff.tasks.huggingface.limits import Limits, check_vocabulary
from npeff.tasks.huggingface.options import PretrainedOptions, TextOptions

_TEXTS_AT_ONCE = 1024
"""Texts per call of the tokenizer: enough for its threads, and few enough for the memory of its Python lists."""

_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""Beginning of a SentencePiece token that starts with a space, which decoding omits."""

NO_TEXT, SOME_TEXT = -1, 2**15 - 1
"""Entries of `Tokens.text_of` besides 0 and 1."""

Side = Literal["left", "right"]
NoteT = TypeVar("NoteT")


@dataclass(frozen=True)
class Tokens:
    """The tokens of N texts, or of N pairs of texts."""

    inputs: Mapping[str, Sequence[np.ndarray]]
    """``input_ids`` and, if the tokenizer returns them, ``token_type_ids``: N arrays each."""
    padding: Mapping[str, int]
    """Padding value of each of these."""
    text_of: Sequence[np.ndarray]
    """Number of the text of each token, 0 or 1; `NO_TEXT` for a special token, and `SOME_TEXT` for a token of a pair
    whose tokenizer does not tell which text it is from."""

    @property
    def ids(self) -> Sequence[np.ndarray]:
        return self.inputs["input_ids"]

    def lengths(self) -> list[int]:
        """Return the number of tokens of each text."""
        return [len(row) for row in self.ids]

    def divided(self, lengths: Sequence[int]) -> Tokens:
        """Return single texts as pairs whose first text has the given number of tokens."""
        second = [np.arange(len(row)) >= length for row, length in zip(self.text_of, lengths, strict=True)]
        text_of = [np.where((row == 0) & rest, 1, row) for row, rest in zip(self.text_of, second, strict=True)]
        return replace(self, text_of=text_of)

    def segments(self, indices: Sequence[int], side: Side = "right", stop: Sequence[int] | None = None) -> Tensor:
        """Return `text_of` of some texts (B, T), with `NO_TEXT` at padding. The arguments are those of `batch`."""
        return padded(_cut(self.text_of, indices, stop), NO_TEXT, side)

    def batch(
        self, indices: Sequence[int], side: Side = "right", stop: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the padded inputs (B, T) of some texts and their attention mask, with only the first `stop` tokens."""
        rows = {name: _cut(values, indices, stop) for name, values in self.inputs.items()}
        mask = [np.ones(len(row), np.int64) for row in rows["input_ids"]]
        found = {name: padded(values, self.padding[name], side) for name, values in rows.items()}
        return found | {"attention_mask": padded(mask, 0, side)}


def _cut(values: Sequence[np.ndarray], indices: Sequence[int], stop: Sequence[int] | None) -> list[np.ndarray]:
    """Return the first `stop` entries of some rows, or the whole rows."""
    ends = [None] * len(indices) if stop is None else stop
    return [values[index][:end] for index, end in zip(indices, ends, strict=True)]


def padded(rows: Sequence[np.ndarray], value: int, side: Side = "right") -> Tensor:
    """Return rows of integers as one int64 tensor (B, T), padded with `value`."""
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
    limits: Limits,
    note: Callable[[int, Any], NoteT] | None = None,
    target: bool = False,
    **further: Any,
) -> tuple[Tokens, list[NoteT]]:
    """Tokenize N texts, or N pairs if two sequences of texts are given.

    Args:
        tokenizer: The tokenizer.
        pad_token_id: The padding token.
        options: Options of the texts.
        ids: Ids of the texts, for error messages.
        texts: One or two sequences of texts.
        limits: Sizes of the tables of the model.
        note: Function of the number of a text and its `tokenizers.Encoding`, whose results are returned.
        target: Whether the texts are outputs of a sequence-to-sequence model.
        further: Arguments of the tokenizer.

    Returns:
        The tokens, and the result of `note` for each text.

    Raises:
        TaskError: A text has no tokens or too many, the tokenizer does not know most of the texts, the model has no
            place for their tokens, or `note` is given and the tokenizer has no encodings.
    """
    check_vocabulary(tokenizer, options)
    _check_room(tokenizer, options, len(texts))
    inputs: dict[str, list[np.ndarray]] = {"input_ids": []}
    notes: list[NoteT] = []
    text_of: list[np.ndarray] = []
    known = KnownText(tokenizer)
    for start in range(0, len(ids), _TEXTS_AT_ONCE):
        chosen = [list(column[start : start + _TEXTS_AT_ONCE]) for column in texts]
        given: tuple[list[list[Any]], dict[str, Any]] = ([], {"text_target": chosen[0]}) if target else (chosen, {})
        settings = {"truncation": True, "max_length": options.max_length, "return_special_tokens_mask": True, **further}
        encoded = tokenizer(*given[0], **given[1], **settings)
        known.add(encoded, chosen)
        text_of += _text_of(encoded, len(chosen))
        for name in set(encoded) & {"input_ids", "token_type_ids"}:
            inputs.setdefault(name, []).extend(np.asarray(row, np.int32) for row in encoded[name])
        if note is not None and encoded.encodings is None:
            raise TaskError(f"the tokenizer of {options.model!r} has no character offsets: use a fast tokenizer")
        if note is not None:
            notes += [note(start + number, encoding) for number, encoding in enumerate(encoded.encodings)]
    _check_lengths(ids, inputs["input_ids"], options)
    known.check(options)
    limits.check(inputs, ids, options)
    padding = {"input_ids": pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    return Tokens(inputs, padding, text_of), notes


def _check_lengths(ids: Sequence[str], rows: Sequence[np.ndarray], options: TextOptions) -> None:
    """Check that each text has tokens, and that the tokenizer truncates."""
    for example, row in zip(ids, rows, strict=True):
        if not len(row):
            raise TaskError(f"{options.data}: the text of row {example!r} has no tokens: exclude the row with filter")
        if len(row) > options.max_length:
            raise TaskError(
                f"{options.data}: the tokenizer of {options.processor or options.model!r} truncates row {example!r} to "
                f"{len(row)} tokens, not to {options.max_length}: raise max_length, or set processor to the tokenizer "
                "of the model"
            )


def _text_of(encoded: Any, n_texts: int) -> list[np.ndarray]:
    """Return the number of the text of each token.

    Token types are of no use: many tokenizers have none, and some give the separator that of the text before it.
    """
    special = [np.asarray(row, np.bool_) for row in encoded["special_tokens_mask"]]
    if encoded.encodings is None:
        return [np.where(row, NO_TEXT, 0 if n_texts == 1 else SOME_TEXT).astype(np.int16) for row in special]
    owners = [
        np.array([NO_TEXT if owner is None else owner for owner in encoding.sequence_ids], np.int16)
        for encoding in encoded.encodings
    ]
    return [np.where(row, NO_TEXT, numbers) for row, numbers in zip(special, owners, strict=True)]


def _check_room(tokenizer: Any, options: TextOptions, n_texts: int) -> None:
    """Check that there is room for a token of each text. Without it, tokenizers do not truncate."""
    n_special = tokenizer.num_special_tokens_to_add(pair=n_texts == 2)
    if options.max_length < n_special + n_texts:
        raise TaskError(
            f"max_length is {options.max_length}, but the tokenizer of {options.processor or options.model!r} adds "
            f"{n_special} special tokens: set max_length to at least {n_special + n_texts}"
        )


def placed_tokens(
    tokenizer: Any, options: TextOptions, *texts: Any, starts: Sequence[int], **further: Any
) -> list[Token]:
    """Return the tokens of one text or of a pair, as in `tokenize`, with their characters for a fast tokenizer.

    Args:
        tokenizer: The tokenizer.
        options: Options of the texts.
        texts: One or two texts, or one list of words with ``is_split_into_words``.
        starts: First character of each text, or of each word, in the displayed text.
        further: Arguments of the tokenizer.
    """
    encoded = tokenizer(*texts, truncation=True, max_length=options.max_length, **further)
    if encoded.encodings is None:
        return [Token(piece) for piece in tokenizer.convert_ids_to_tokens(encoded["input_ids"])]
    (encoding,) = encoded.encodings
    words = further.get("is_split_into_words", False)
    owners, parts = (encoding.word_ids, texts[0]) if words else (encoding.sequence_ids, texts)
    tokens = []
    for piece, (start, stop), owner in zip(encoding.tokens, encoding.offsets, owners, strict=True):
        if owner is None or start == stop:  # a token without text
            tokens.append(Token(piece))
        else:
            tokens.append(Token(parts[owner][start:stop], starts[owner] + start, starts[owner] + stop))
    return tokens


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str | None]:
    """Return the texts of single tokens, with their leading spaces.

    A token that is only a part of a character is shown as in the vocabulary. None if the tokenizer has no such token.
    """
    found: list[str | None] = []
    for number in ids:
        if number >= len(tokenizer):  # the embedding may be larger than the vocabulary
            found.append(None)
            continue
        piece = tokenizer.convert_ids_to_tokens(number)
        text = tokenizer.decode([number], clean_up_tokenization_spaces=False)
        if not text or "\N{REPLACEMENT CHARACTER}" in text:
            text = piece
        elif piece.startswith(_WORD_START) and not text.startswith(" "):
            text = f" {text}"
        found.append(text)
    return found


def pad_token_id(tokenizer: Any, config: Any) -> int:
    """Return the padding token: that of the model or the tokenizer, or the end-of-text token.

    Padding is masked, so any token would do, except for models that classify at the last token, which detect the
    padding by its token.
    """
    text_config = config.get_text_config()
    candidates = (text_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    size = getattr(text_config, "vocab_size", None) or len(tokenizer)
    return next((int(candidate) for candidate in candidates if candidate is not None and 0 <= candidate < size), 0)


def check_last_tokens(
    tokenizer: Any, config: Any, tokens: Tokens, ids: Sequence[str], options: PretrainedOptions
) -> None:
    """Check that a model that classifies at the last token finds this token in every batch.

    A causal model takes the last token before the padding, and without a padding token of its own the last token of a
    single text, whichever it is. An encoder-decoder model takes the last end-of-text token, of which all texts must
    have the same number.

    Raises:
        TaskError: A text ends with the padding token, or has another number of end-of-text tokens.
    """
    text_config, padding = config.get_text_config(), pad_token_id(tokenizer, config)
    if config.is_encoder_decoder:
        ends = [int((row == text_config.eos_token_id).sum()) for row in tokens.ids]
        for example, end in zip(ids, ends, strict=True):
            if end == 0 or end != ends[0]:
                raise TaskError(
                    f"{options.data}: the text of row {example!r} has {end} end-of-text tokens, and row {ids[0]!r} has "
                    f"{ends[0]}, but {options.model!r} needs one or more, the same number in all texts: exclude the "
                    "row with filter, or set processor to the tokenizer of the model"
                )
        return
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    for example, row in zip(ids, tokens.ids, strict=True):
        if causal and text_config.pad_token_id is None and row[-1] == padding:
            raise TaskError(
                f"{options.data}: the text of row {example!r} ends with {tokenizer.convert_ids_to_tokens(padding)!r}, "
                f"which is also the padding, and {options.model!r} classifies at the last token before the padding: "
                "set pad_token_id in the configuration of the model to a token that ends no text"
            )


def padding_side(config: Any) -> Side:
    """Return "right", or "left" for models that classify at the last position (XLNet), with relative positions."""
    return "left" if getattr(config, "summary_type", None) == "last" else "right"
