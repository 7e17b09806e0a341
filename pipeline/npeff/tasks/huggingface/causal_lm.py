"""Causal language models, which predict every token from the preceding tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from npeff.tasks.base import IGNORED, Examples, Inputs, Token
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.limits import Limits
from npeff.tasks.huggingface.options import CausalLMOptions
from npeff.tasks.huggingface.predictions import Predictions, at_places, marked
from npeff.tasks.huggingface.pretrained import PretrainedTask, load_model, model_config, tokenizer_of
from npeff.tasks.huggingface.token_table import text_inputs, token_table
from npeff.tasks.huggingface.tokens import pad_token_id, placed_tokens, token_texts, tokenize
from npeff.tasks.tables import texts


class CausalLMTask(PretrainedTask[CausalLMOptions]):
    """``AutoModelForCausalLM`` on a table of texts, with or without prompts. The classes are the vocabulary."""

    Options = CausalLMOptions

    def model(self, cache: Path) -> nn.Module:
        model = load_model(self.options, AutoModelForCausalLM)
        is_skeleton = next(model.parameters()).is_meta
        if not is_skeleton and self.options.attention != "flash_attention_2":  # which needs a GPU
            _check_causal(model, self.options)
        return model

    def examples(self, cache: Path) -> Examples:
        return _Texts(self.options)

    def logits(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if _takes_positions(model):  # saves the logits of the other positions
            logits = model(**batch["inputs"], logits_to_keep=batch["kept"]).logits
        else:
            logits = model(**batch["inputs"]).logits[:, batch["kept"]]
        return at_places(logits, batch, len(batch["kept"]))

    def targets(self, batch: Mapping[str, Any]) -> Tensor | None:
        return batch.get("targets")

    def inputs(self, model: nn.Module, batch: Mapping[str, Any]) -> Inputs:
        table = token_table(model, self.options)
        return text_inputs(
            table, batch["inputs"], batch["segments"], lambda: self.logits(model, batch), self.options.texts
        )


class _Texts(Examples):
    class_names = ()

    def __init__(self, options: CausalLMOptions) -> None:
        self._used = [options.text_column, *([options.prompt_column] if options.prompt_column else [])]
        self._rows = options.read(self._used)
        text = texts(self._rows, options.text_column, options.data)
        prompts = [""] * len(text)
        if options.prompt_column is not None:
            prompts = texts(self._rows, options.prompt_column, options.data)
        self._texts = [prompt + rest for prompt, rest in zip(prompts, text, strict=True)]
        self._tokenizer, self._options = tokenizer_of(options), options
        padding = pad_token_id(self._tokenizer, model_config(options))
        self._tokens, prompt_lengths = tokenize(
            self._tokenizer,
            padding,
            options,
            self._rows["id"].to_pylist(),
            self._texts,
            limits=Limits.of(options, AutoModelForCausalLM),
            note=lambda row, encoding: _prompt_length(encoding.offsets, len(prompts[row])),
        )
        targets = [_next_tokens(*row) for row in zip(self._tokens.ids, prompt_lengths, strict=True)]
        self._predictions = Predictions.of(targets, options)
        if options.prompt_column is not None:
            self._tokens = self._tokens.divided(prompt_lengths)

    def __len__(self) -> int:
        return len(self._predictions)

    def lengths(self) -> list[int]:
        if self._predictions.places is None:
            return self._tokens.lengths()
        result: list[int] = (self._predictions.places + 1).tolist()
        return result

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return a batch.

        It has ``inputs``, ``segments`` (the text of each token), ``kept`` (the positions of the needed logits), and the
        targets or places in ``kept``.
        """
        rows = self._predictions.rows[list(indices)].tolist()
        made = self._predictions.batch(indices)
        if "places" in made:
            stop = (made["places"] + 1).tolist()
            inputs, segments = self._tokens.batch(rows, stop=stop), self._tokens.segments(rows, stop=stop)
            kept, places = made["places"].unique(return_inverse=True)
            return {"inputs": inputs, "segments": segments, "kept": kept, "places": places}
        live = (made["targets"] != IGNORED).any(0)
        kept = live.nonzero()[:, 0] if live.any() else torch.zeros(1, dtype=torch.int64)
        inputs, segments = self._tokens.batch(rows), self._tokens.segments(rows)
        return {"inputs": inputs, "segments": segments, "kept": kept, "targets": made["targets"][:, kept]}

    def tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        """Return the tokens, without characters if the displayed text contains a mark."""
        found, places = [], self._predictions.places
        for index in indices:
            text = self._texts[self._predictions.rows[index]]
            tokens = placed_tokens(self._tokenizer, self._options, text, starts=(0,))
            if places is not None:
                tokens = [Token(token.text) for token in tokens[: places[index] + 1]]
            found.append(tokens)
        return found

    def class_texts(self, classes: Sequence[int]) -> list[str | None]:
        return token_texts(self._tokenizer, classes)

    def table(self) -> pa.Table:
        predictions = self._predictions
        if predictions.places is None:
            return predictions.table(self._rows, self._texts, [], self._used)
        numbers = (predictions.places + 1).tolist()
        shown = [
            marked(self._tokenizer, self._tokens.ids[row], number)
            for row, number in zip(predictions.rows, numbers, strict=True)
        ]
        return predictions.table(
            self._rows, [text for text, _ in shown], numbers, self._used, token=[token for _, token in shown]
        )


def _prompt_length(offsets: Sequence[tuple[int, int]], prompt_characters: int) -> int:
    """Return the number of tokens that end in the prompt. A token that extends into the text is predicted."""
    return next((token for token, (_, end) in enumerate(offsets) if end > prompt_characters), len(offsets))


def _next_tokens(token_ids: np.ndarray, prompt_length: int) -> np.ndarray:
    """Return the target of each position: the next token, or no prediction if it is in the prompt or missing."""
    predicted = token_ids.astype(np.int64)
    predicted[:prompt_length] = IGNORED
    return np.append(predicted[1:], IGNORED)


@torch.no_grad()
def _check_causal(model: nn.Module, options: CausalLMOptions) -> None:
    """Raise TaskError if the logits at a position depend on the tokens after it, as in a model for masked tokens."""
    texts = torch.tensor([[0, 0], [0, 1]], device=next(model.parameters()).device)
    one, other = model(input_ids=texts).logits[:, 0].double()
    half = options.quantization == "bitsandbytes-8bit"  # which computes in float16
    rounding = torch.finfo(torch.float16 if half else getattr(torch, options.dtype)).eps ** 0.5
    if (one - other).abs().max() > rounding * one.abs().max():
        raise TaskError(
            f"{options.model!r} is not a causal language model: its logits depend on the tokens that they predict, so "
            "use a causal model, or set is_decoder in the configuration of a model that was trained as a decoder"
        )


def _takes_positions(model: Any) -> bool:
    """Return whether the model can compute logits at selected positions only."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # under a PEFT adapter
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
