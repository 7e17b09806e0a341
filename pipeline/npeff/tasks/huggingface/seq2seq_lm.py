"""Sequence-to-sequence language models, which predict every target token from the source and the preceding tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from npeff.tasks.base import IGNORED, Examples, Inputs, Token
from npeff.tasks.huggingface.limits import Limits
from npeff.tasks.huggingface.options import Seq2SeqLMOptions
from npeff.tasks.huggingface.predictions import Predictions, at_places, marked
from npeff.tasks.huggingface.pretrained import TextTask, load_model, model_config, tokenizer_of
from npeff.tasks.huggingface.token_table import text_inputs, token_table
from npeff.tasks.huggingface.tokens import pad_token_id, padded, placed_tokens, token_texts, tokenize
from npeff.tasks.prepared import Joined, Prepared
from npeff.tasks.tables import texts


class Seq2SeqLMTask(TextTask[Seq2SeqLMOptions]):
    """``AutoModelForSeq2SeqLM`` on a table of sources and targets. The classes are the vocabulary."""

    Options = Seq2SeqLMOptions

    def model(self, cache: Path) -> nn.Module:
        return load_model(
            self.options, AutoModelForSeq2SeqLM, pad_token_id(tokenizer_of(self.options), model_config(self.options))
        )

    def read_examples(self, files: Prepared) -> Examples:
        return _Pairs(self.options, files)

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        labels = batch["labels"]
        logits = model(**batch["inputs"], **_decoder_inputs(model, labels), use_cache=False).logits
        return at_places(logits, batch, labels.shape[1])

    def targets(self, batch: Mapping[str, Any]) -> Tensor | None:
        return batch.get("targets")

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Inputs:
        """Return the embeddings of the source, the inputs of the encoder."""
        table = token_table(model, self.options)
        return text_inputs(table, batch["inputs"], batch["segments"], lambda: self.logits(model, batch))


def _decoder_inputs(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """Return the input of the decoder, which the model makes of the labels: how a target starts depends on the model.

    If the labels themselves are given, the model also computes a loss, to which an adapter may add terms.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # under a PEFT adapter
    shifted = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    return {"labels": labels} if shifted is None else {"decoder_input_ids": shifted(labels)}


class _Pairs(Examples):
    class_names = ()

    def __init__(self, options: Seq2SeqLMOptions, files: Prepared) -> None:
        used = [options.source_column, options.target_column]
        rows = options.read(used, files=files)
        self._source, self._target = (texts(rows, column, options.data) for column in used)
        self._tokenizer, self._options = tokenizer_of(options), options
        ids, padding = texts(rows, "id", options.data), pad_token_id(self._tokenizer, model_config(options))
        self._source_tokens, self._target_tokens = (
            tokenize(
                files,
                name,
                self._tokenizer,
                padding,
                options,
                ids,
                column,
                limits=Limits.of(options, AutoModelForSeq2SeqLM, target=name == "targets"),
                target=name == "targets",
            )
            for name, column in (("sources", self._source), ("targets", self._target))
        )
        self._predictions = Predictions.of(self._target_tokens.ids, options)
        self._table = files.table("examples", lambda: self._predictions.parts(rows, self._shown, used))

    def __len__(self) -> int:
        return len(self._predictions)

    def lengths(self) -> NDArray[np.integer]:
        found = np.add(self._source_tokens.lengths(), self._target_tokens.lengths())
        result: NDArray[np.integer] = found[self._predictions.rows]
        return result

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return a batch with whole targets. The logits at a predicted token depend on the preceding tokens only."""
        rows = self._predictions.rows[list(indices)].tolist()
        labels = padded([self._target_tokens.ids[row] for row in rows], IGNORED)
        inputs, segments = self._source_tokens.batch(rows), self._source_tokens.segments(rows)
        return {"inputs": inputs, "segments": segments, "labels": labels, **self._predictions.batch(indices)}

    def input_tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        """Return the tokens of the sources, with which the displayed texts begin."""
        sources = [self._source[row] for row in self._predictions.rows[list(indices)]]
        return [placed_tokens(self._tokenizer, self._options, source, starts=(0,)) for source in sources]

    def class_texts(self, classes: Sequence[int]) -> list[str | None]:
        return token_texts(self._tokenizer, classes)

    def prediction_texts(self, predictions: Sequence[tuple[int, int]]) -> list[str | None]:
        found = list[str | None]()
        for index, number in predictions:
            ids = self._target_tokens.ids[self._predictions.rows[index]]
            found.append(marked(self._tokenizer, ids, self._predictions.position(index, number))[0])
        return found

    def table(self) -> pa.Table:
        return self._table

    def _shown(self, part: slice) -> dict[str, pa.Array]:
        """Return the columns that are shown of some examples."""
        places = self._predictions.places
        if places is None:
            return {"text": pa.array(Joined([self._source, self._target], "\n")[part], pa.string())}
        text, tokens = [], []
        for row, place in zip(self._predictions.rows[part], places[part].tolist(), strict=True):
            shown, token = marked(self._tokenizer, self._target_tokens.ids[row], place)
            text.append(f"{self._source[row]}\n{shown}")
            tokens.append(token)
        columns = {"text": pa.array(text, pa.string()), "token": pa.array(tokens, pa.string())}
        return {"position": pa.array(places[part], pa.int64()), **columns}
