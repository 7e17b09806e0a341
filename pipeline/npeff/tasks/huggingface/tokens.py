"""Token ids of texts, which are computed once, and batches of token ids.

Batches are padded on the right, independent of the tokenizer. Positions are then counted from the first token of a
text, so no model needs explicit positions, and padding cannot change the logits of a causal model.

Legend: B batch, T tokens of the longest example in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from npeff.tasks.base import Token
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.known_text import KnownText
from npeff.tasks.huggingface.limits import Limits, check_vocabulary
from npeff.tasks.huggingface.options import PretrainedOptions, TextOptions
from npeff.tasks.prepared import Arrays, Prepared, slices

_TEXTS_AT_ONCE = 1024
"""Texts per call of the tokenizer: enough for its threads, and few enough for the memory of its Python lists."""

_WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
"""Beginning of a SentencePiece token that starts with a space, which decoding omits."""

NO_TEXT, SOME_TEXT = -1, 2**15 - 1
"""Entries of `Tokens.text_of` besides 0 and 1."""

Side = Literal["left", "right"]


@dataclass(frozen=True)
class Tokens:
    """The tokens of N texts, or of N pairs of texts."""

    inputs: Mapping[str, Arrays]
    """``input_ids`` and, if the tokenizer returns them, ``token_type_ids``: N arrays each."""
    padding: Mapping[str, int]
    """Padding value of each of these."""
    text_of: Arrays
    """Number of the text of each token, 0 or 1; `NO_TEXT` for a special token, and `SOME_TEXT` for a token of a pair
    whose tokenizer does not tell which text it is from."""
    notes: Arrays | None
    """What `tokenize` has noted of each text."""
    first_lengths: NDArray[np.integer] | None = None
    """Number of the tokens of each text that are its first part, if it has two; see `divided`."""

    @classmethod
    def of(cls, table: pa.Table, padding: Mapping[str, int]) -> Tokens:
        """Read the columns of a table that `tokenize` has written."""
        columns = {name: Arrays(table[name]) for name in table.column_names}
        text_of, notes = columns.pop("text_of"), columns.pop("notes", None)
        return cls(columns, padding, text_of, notes)

    @property
    def ids(self) -> Arrays:
        return self.inputs["input_ids"]

    def lengths(self) -> NDArray[np.int32]:
        """Return the number of tokens of each text."""
        return self.ids.lengths()

    def divided(self, lengths: NDArray[np.integer]) -> Tokens:
        """Return single texts as pairs whose first text has the given number of tokens."""
        return replace(self, first_lengths=lengths)

    def segments(self, indices: Sequence[int], side: Side = "right", stop: Sequence[int] | None = None) -> Tensor:
        """Return `text_of` of some texts (B, T), with `NO_TEXT` at padding. The arguments are those of `batch`."""
        return padded(_cut(map(self._text_of, indices), stop), NO_TEXT, side)

    def _text_of(self, index: int) -> NDArray[np.integer]:
        row = self.text_of[index]
        if self.first_lengths is None:
            return row
        rest = np.arange(len(row)) >= self.first_lengths[index]
        return np.where((row == 0) & rest, 1, row)

    def batch(
        self, indices: Sequence[int], side: Side = "right", stop: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Return the padded inputs (B, T) of some texts and their attention mask, with only the first `stop` tokens."""
        rows = {name: _cut((values[index] for index in indices), stop) for name, values in self.inputs.items()}
        mask = [np.ones(len(row), np.int64) for row in rows["input_ids"]]
        found = {name: padded(values, self.padding[name], side) for name, values in rows.items()}
        return found | {"attention_mask": padded(mask, 0, side)}


def _cut(rows: Iterable[np.ndarray], stop: Sequence[int] | None) -> list[np.ndarray]:
    """Return the first `stop` entries of some rows, or the whole rows."""
    return list(rows) if stop is None else [row[:end] for row, end in zip(rows, stop, strict=True)]


def padded(rows: Sequence[np.ndarray], value: int, side: Side = "right") -> Tensor:
    """Return rows of integers as one int64 tensor (B, T), padded with `value`."""
    longest = max(map(len, rows), default=0)
    filled = torch.full((len(rows), longest), value, dtype=torch.int64)
    for target, row in zip(filled, rows, strict=True):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        target[place] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return filled


def tokenize(
    files: Prepared,
    name: str,
    tokenizer: Any,
    pad_token_id: int,
    options: TextOptions,
    ids: Sequence[str],
    *texts: Sequence[Any],
    limits: Limits,
    note: Callable[[int, Any], Sequence[int] | np.ndarray] | None = None,
    check: Callable[[Tokens], object] = lambda _: None,
    target: bool = False,
    **further: Any,
) -> Tokens:
    """Tokenize N texts, or N pairs if two sequences of texts are given, or read their tokens if they are prepared.

    Args:
        files: The files of the task.
        name: Name of the file with the tokens.
        tokenizer: The tokenizer.
        pad_token_id: The padding token.
        options: Options of the texts.
        ids: Ids of the texts, for error messages.
        texts: One or two sequences of texts.
        limits: Sizes of the tables of the model.
        note: Function of the number of a text and its `tokenizers.Encoding`. It returns integers, which are kept.
        check: Further check of the tokens.
        target: Whether the texts are outputs of a sequence-to-sequence model.
        further: Arguments of the tokenizer.

    Raises:
        TaskError: A text has no tokens or too many, the tokenizer does not know most of the texts, the model has no
            place for their tokens, or `note` is given and the tokenizer has no encodings.
    """
    check_vocabulary(tokenizer, options)
    _check_room(tokenizer, options, len(texts))
    known = KnownText(tokenizer)
    padding = {"input_ids": pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
    settings = {"truncation": True, "max_length": options.max_length, "return_special_tokens_mask": True, **further}

    def parts() -> Iterator[pa.Table]:
        for rows in slices(len(ids), _TEXTS_AT_ONCE):
            chosen = [list(column[rows]) for column in texts]
            if not chosen[0]:
                yield _arrays({"input_ids": [], "text_of": []})
                return
            given: tuple[list[list[Any]], dict[str, Any]] = ([], {"text_target": chosen[0]}) if target else (chosen, {})
            encoded = tokenizer(*given[0], **given[1], **settings)
            known.add(encoded, chosen)
            kept = {each: encoded[each] for each in ("input_ids", "token_type_ids") if each in encoded}
            if note is not None and encoded.encodings is None:
                raise TaskError(f"the tokenizer of {options.model!r} has no character offsets: use a fast tokenizer")
            if note is not None:
                kept["notes"] = [note(rows.start + place, each) for place, each in enumerate(encoded.encodings)]
            yield _arrays({**kept, "text_of": _text_of(encoded, len(chosen))})

    def check_all(table: pa.Table) -> None:
        tokens = Tokens.of(table, padding)
        _check_lengths(ids, tokens.lengths(), options)
        known.check(options)
        limits.check(tokens.inputs, ids, options)
        check(tokens)

    return Tokens.of(files.table(name, parts, check_all), padding)


def _arrays(columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Return columns of lists of integers."""
    kinds = {"text_of": pa.int16()}
    return pa.table({name: pa.array(rows, pa.list_(kinds.get(name, pa.int32()))) for name, rows in columns.items()})


def _check_lengths(ids: Sequence[str], lengths: NDArray[np.int32], options: TextOptions) -> None:
    """Check that each text has tokens, and that the tokenizer truncates."""
    for row in np.flatnonzero((lengths == 0) | (lengths > options.max_length))[:1].tolist():
        if not lengths[row]:
            raise TaskError(f"{options.data}: the text of row {ids[row]!r} has no tokens: exclude the row with filter")
        raise TaskError(
            f"{options.data}: the tokenizer of {options.processor or options.model!r} truncates row {ids[row]!r} to "
            f"{lengths[row]} tokens, not to {options.max_length}: raise max_length, or set processor to the tokenizer "
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
    first = None
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) not in MODEL_FOR_MASKED_LM_MAPPING
    for start, offsets, values in tokens.ids.chunks():
        if config.is_encoder_decoder:
            ends = np.add.reduceat(values == text_config.eos_token_id, offsets[:-1], dtype=np.int64)
            first = int(ends[0]) if first is None else first
            for row in np.flatnonzero((ends == 0) | (ends != first))[:1].tolist():
                raise TaskError(
                    f"{options.data}: the text of row {ids[start + row]!r} has {ends[row]} end-of-text tokens, and row "
                    f"{ids[0]!r} has {first}, but {options.model!r} needs one or more, the same number in all texts: "
                    "exclude the row with filter, or set processor to the tokenizer of the model"
                )
        elif causal and text_config.pad_token_id is None:
            for row in np.flatnonzero(values[offsets[1:] - 1] == padding)[:1].tolist():
                raise TaskError(
                    f"{options.data}: the text of row {ids[start + row]!r} ends with "
                    f"{tokenizer.convert_ids_to_tokens(padding)!r}, which is also the padding, and {options.model!r} "
                    "classifies at the last token before the padding: set pad_token_id in the configuration of the "
                    "model to a token that ends no text"
                )


def padding_side(config: Any) -> Side:
    """Return "right", or "left" for models that classify at the last position (XLNet), with relative positions."""
    return "left" if getattr(config, "summary_type", None) == "last" else "right"
