"""Classification of the words of a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification

from npeff.tasks.base import IGNORED, UNKNOWN, Examples, Inputs, Token, placed_words
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.limits import Limits
from npeff.tasks.huggingface.options import TokenClassificationOptions
from npeff.tasks.huggingface.predictions import Predictions, at_places
from npeff.tasks.huggingface.pretrained import TextTask, classes, load_classifier, model_config, tokenizer_of
from npeff.tasks.huggingface.token_table import text_inputs, token_table
from npeff.tasks.huggingface.tokens import pad_token_id, placed_tokens, tokenize
from npeff.tasks.labels import class_numbers
from npeff.tasks.prepared import Prepared
from npeff.tasks.tables import type_of

_OUTSIDE = "O"
"""The tag of a word outside all entities in IOB schemes."""
_SHOWN_WORDS = 12
"""Number of words that are displayed on each side of a classified word."""


class TokenClassificationTask(TextTask[TokenClassificationOptions]):
    """``AutoModelForTokenClassification`` on a table of words. A word is classified at its first token."""

    Options = TokenClassificationOptions

    def model(self, cache: Path) -> nn.Module:
        return load_classifier(self.options, AutoModelForTokenClassification, self.options.label_names)

    def read_examples(self, files: Prepared) -> Examples:
        return _Words(self.options, files)

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return at_places(model(**batch["inputs"]).logits, batch, batch["inputs"]["input_ids"].shape[1])

    def targets(self, batch: Mapping[str, Any]) -> Tensor | None:
        return batch.get("targets")

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Inputs:
        table = token_table(model, self.options)
        return text_inputs(table, batch["inputs"], batch["segments"], lambda: self.logits(model, batch))


class _Words(Examples):
    def __init__(self, options: TokenClassificationOptions, files: Prepared) -> None:
        used = [options.words_column, *([options.tags_column] if options.tags_column else [])]
        self._rows = options.read([options.words_column], options.tags_column, files)
        config = model_config(options)
        self.class_names = classes(config, options.label_names, options.model)
        ids = self._rows["id"].to_pylist()
        self._words = [list(map(str, row)) for row in _lists(self._rows, options.words_column, options.data)]
        self._tags = self._read_tags(ids, options)
        tokenizer, self._options = tokenizer_of(options), options
        if getattr(tokenizer, "add_prefix_space", None) is False:  # required by such a tokenizer for input in words
            tokenizer = tokenizer_of(options, add_prefix_space=True)
        self._tokenizer = tokenizer
        self._tokens = tokenize(
            files,
            "tokens",
            tokenizer,
            pad_token_id(tokenizer, config),
            options,
            ids,
            self._words,
            limits=Limits.of(options, AutoModelForTokenClassification),
            note=lambda _, encoding: _first_tokens(encoding, tokenizer.truncation_side),
            is_split_into_words=True,
        )
        assert self._tokens.notes is not None
        self._word_of_token = self._tokens.notes
        words_and_tags = zip(self._word_of_token, self._tags, strict=True)
        targets = [
            np.append(tags, IGNORED)[words] for words, tags in words_and_tags
        ]  # index -1, the appended entry, means no word
        self._predictions = Predictions.of(targets, options)
        self._table = files.table("examples", lambda: self._predictions.parts(self._rows, self._shown_columns, used))

    def _read_tags(self, ids: Sequence[str], options: TokenClassificationOptions) -> list[np.ndarray]:
        """Return the class number of each word of each row."""
        if options.tags_column is None:
            return [np.full(len(words), UNKNOWN) for words in self._words]
        table = self._rows
        if pa.types.is_integer(table[options.tags_column].type):  # one tag in each row of a CSV file
            place = table.column_names.index(options.tags_column)
            table = table.set_column(place, options.tags_column, table[options.tags_column].cast(pa.string()))
        rows = _lists(table, options.tags_column, options.data)
        for example, words, tags in zip(ids, self._words, rows, strict=True):
            if len(tags) != len(words):
                raise TaskError(
                    f"{options.data}: row {example!r} has {len(words)} words and {len(tags)} tags: give one for each"
                )
        flat = [tag for tags in rows for tag in tags]
        if all(isinstance(tag, str) and _is_integer(tag) for tag in flat):
            flat = list(map(int, flat))
        numbers = class_numbers(flat, self.class_names, options.data, options.label_values)
        known = np.array([UNKNOWN if number is None else number for number in numbers], np.int64)
        return np.split(known, np.cumsum([len(tags) for tags in rows])[:-1])

    def __len__(self) -> int:
        return len(self._predictions)

    def lengths(self) -> NDArray[np.int32]:
        found: NDArray[np.int32] = self._tokens.lengths()[self._predictions.rows]
        return found

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        rows = self._predictions.rows[list(indices)].tolist()
        made = self._predictions.batch(indices)
        return {"inputs": self._tokens.batch(rows), "segments": self._tokens.segments(rows), **made}

    def tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        found = []
        for index in indices:
            row, number = self._predictions.rows[index], self._chosen_word(index)
            starts = [token.start or 0 for token in placed_words(self._shown(index))]
            if number is not None:
                starts[number] += 1  # after the bracket
            words = self._words[row]
            found.append(placed_tokens(self._tokenizer, self._options, words, starts=starts, is_split_into_words=True))
        return found

    def prediction_texts(self, predictions: Sequence[tuple[int, int]]) -> list[str | None]:
        """Return the words around the classified ones."""
        found = list[str | None]()
        for index, number in predictions:
            row = self._predictions.rows[index]
            chosen = int(self._word_of_token[row][self._predictions.position(index, number)])
            start, stop = max(0, chosen - _SHOWN_WORDS), chosen + _SHOWN_WORDS + 1
            words = _marked(self._words[row], chosen)
            around = [*(["…"] if start else []), *words[start:stop], *(["…"] if stop < len(words) else [])]
            found.append(" ".join(around))
        return found

    def table(self) -> pa.Table:
        return self._table

    def _shown_columns(self, part: slice) -> dict[str, pa.Array]:
        """Return the columns that are shown of some examples."""
        examples = range(part.start, part.stop)
        columns = {"text": pa.array([" ".join(self._shown(index)) for index in examples], pa.string())}
        if self._predictions.places is None:
            return columns
        numbers = [self._chosen_word(index) or 0 for index in examples]
        words = zip(self._predictions.rows[part], numbers, strict=True)
        chosen = pa.array([self._words[row][number] for row, number in words], pa.string())
        return {**columns, "position": pa.array(numbers, pa.int64()), "word": chosen}

    def _chosen_word(self, index: int) -> int | None:
        """Return the number of the word of the example's prediction; None if the example is a whole row."""
        places = self._predictions.places
        return None if places is None else int(self._word_of_token[self._predictions.rows[index]][places[index]])

    def _shown(self, index: int) -> list[str]:
        """Return the words for display, with their tags, or with the chosen word in brackets."""
        row, number = self._predictions.rows[index], self._chosen_word(index)
        words = self._words[row]
        if number is None:
            return list(map(self._tagged, words, self._tags[row]))
        return _marked(words, number)

    def _tagged(self, word: str, tag: int) -> str:
        return word if tag == UNKNOWN or self.class_names[tag] == _OUTSIDE else f"{word}/{self.class_names[tag]}"


def _marked(words: Sequence[str], number: int) -> list[str]:
    """Return words with one of them in brackets."""
    return [*words[:number], f"[{words[number]}]", *words[number + 1 :]]


def _first_tokens(encoding: Any, truncation_side: str) -> np.ndarray:
    """Return the number of the word that begins at each token; -1 for the other tokens."""
    word_ids, parts = encoding.word_ids, encoding.overflowing if truncation_side == "left" else ()
    begun = {word for part in parts for word in part.word_ids}  # the first tokens of such a word may be cut off
    pairs = zip([None, *word_ids], word_ids, strict=False)
    return np.array([-1 if word in (None, before) or word in begun else word for before, word in pairs], np.int64)


def _is_integer(text: str) -> bool:
    return text.isascii() and text.isdecimal() and str(int(text)) == text


def _lists(rows: pa.Table, column: str, data: str) -> list[list[Any]]:
    kind = rows[column].type
    values = rows[column].to_pylist()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [value or [] for value in values]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return [(value or "").split() for value in values]
    raise TaskError(
        f"{data}: column {column!r} has type {type_of(rows, column)}: give lists, or strings separated by spaces"
    )
