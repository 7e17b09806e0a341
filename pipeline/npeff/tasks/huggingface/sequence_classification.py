"""Classification of texts, or of pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from npeff.tasks.base import Examples, Inputs, Token
from npeff.tasks.huggingface.limits import Limits
from npeff.tasks.huggingface.options import SequenceClassificationOptions
from npeff.tasks.huggingface.pretrained import PretrainedTask, classes, load_classifier, model_config, tokenizer_of
from npeff.tasks.huggingface.token_table import text_inputs, token_table
from npeff.tasks.huggingface.tokens import (
    Tokens,
    check_last_tokens,
    pad_token_id,
    padding_side,
    placed_tokens,
    tokenize,
)
from npeff.tasks.tables import example_table, texts


class SequenceClassificationTask(PretrainedTask[SequenceClassificationOptions]):
    """``AutoModelForSequenceClassification`` on a table of texts."""

    Options = SequenceClassificationOptions

    def model(self, cache: Path) -> nn.Module:
        padding = pad_token_id(tokenizer_of(self.options), model_config(self.options))
        return load_classifier(self.options, AutoModelForSequenceClassification, self.options.label_names, padding)

    def examples(self, cache: Path) -> Examples:
        return _Texts(self.options)

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
    def __init__(self, options: SequenceClassificationOptions) -> None:
        self._used = [*options.text_columns, *([options.label_column] if options.label_column else [])]
        self._rows = options.read(options.text_columns, options.label_column)
        config, self._tokenizer, self._options = model_config(options), tokenizer_of(options), options
        self.class_names = classes(config, options.label_names, options.model)
        self._labels = options.labels(self._rows, options.label_column, self.class_names)
        self._texts = [texts(self._rows, column, options.data) for column in options.text_columns]
        ids = self._rows["id"].to_pylist()
        self._tokens: Tokens = tokenize(
            self._tokenizer,
            pad_token_id(self._tokenizer, config),
            options,
            ids,
            *self._texts,
            limits=Limits.of(options, AutoModelForSequenceClassification),
        )[0]
        self._side = padding_side(config)
        check_last_tokens(self._tokenizer, config, self._tokens, ids, options)

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> list[int]:
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
        text = ["\n".join(parts) for parts in zip(*self._texts, strict=True)]
        return example_table(self._rows, self._labels, {"text": pa.array(text, pa.string())}, self._used)
