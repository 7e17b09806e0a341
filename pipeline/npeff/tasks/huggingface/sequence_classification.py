"""Classification of texts, or of pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from npeff.tasks.base import Examples, Inputs, Token
from npeff.tasks.huggingface.limits import Limits
from npeff.tasks.huggingface.options import SequenceClassificationOptions
from npeff.tasks.huggingface.pretrained import TextTask, classes, load_classifier, model_config, tokenizer_of
from npeff.tasks.huggingface.token_table import text_inputs, token_table
from npeff.tasks.huggingface.tokens import (
    Tokens,
    check_last_tokens,
    pad_token_id,
    padding_side,
    placed_tokens,
    tokenize,
)
from npeff.tasks.prepared import Joined, Prepared
from npeff.tasks.tables import example_parts, texts


class SequenceClassificationTask(TextTask[SequenceClassificationOptions]):
    """``AutoModelForSequenceClassification`` on a table of texts."""

    Options = SequenceClassificationOptions

    def model(self, cache: Path) -> nn.Module:
        padding = pad_token_id(tokenizer_of(self.options), model_config(self.options))
        return load_classifier(self.options, AutoModelForSequenceClassification, self.options.label_names, padding)

    def read_examples(self, files: Prepared) -> Examples:
        return _Texts(self.options, files)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = model(**_model_inputs(batch)).logits
        return result

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Inputs:
        table = token_table(model, self.options, decoder=True)
        return text_inputs(
            table, batch, batch["segments"], lambda: self.logits(model, batch), self.options.text_columns
        )


def _model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "segments"}


class _Texts(Examples):
    def __init__(self, options: SequenceClassificationOptions, files: Prepared) -> None:
        used = [*options.text_columns, *([options.label_column] if options.label_column else [])]
        rows = options.read(options.text_columns, options.label_column, files)
        config, self._tokenizer, self._options = model_config(options), tokenizer_of(options), options
        self.class_names = classes(config, options.label_names, options.model)
        self._texts = [texts(rows, column, options.data) for column in options.text_columns]
        text = Joined(self._texts, "\n")
        self._table = files.table(
            "examples",
            lambda: example_parts(
                rows,
                options.labels(rows, options.label_column, self.class_names),
                lambda part: {"text": pa.array(text[part], pa.string())},
                used,
            ),
        )
        ids = texts(rows, "id", options.data)
        self._tokens: Tokens = tokenize(
            files,
            "tokens",
            self._tokenizer,
            pad_token_id(self._tokenizer, config),
            options,
            ids,
            *self._texts,
            limits=Limits.of(options, AutoModelForSequenceClassification),
            check=lambda tokens: check_last_tokens(self._tokenizer, config, tokens, ids, options),
        )
        self._side = padding_side(config)

    def __len__(self) -> int:
        return len(self._table)

    def lengths(self) -> NDArray[np.int32]:
        return self._tokens.lengths()

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the inputs of the model, and ``segments``: the text of each token (B, T), as in `Tokens`."""
        return {**self._tokens.batch(indices, self._side), "segments": self._tokens.segments(indices, self._side)}

    def tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        found = []
        for index in indices:
            parts = [column[index] for column in self._texts]
            starts = (0, len(parts[0]) + 1)  # the texts are separated by a line break
            found.append(placed_tokens(self._tokenizer, self._options, *parts, starts=starts))
        return found

    def table(self) -> pa.Table:
        return self._table
