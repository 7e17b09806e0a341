"""Causal language models, which predict every token from the preceding tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from npeff.tasks.base import IGNORED, Examples, Inputs, Token
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.limits import Limits
from npeff.tasks.huggingface.options import CausalLMOptions
from npeff.tasks.huggingface.predictions import Predictions, at_places, marked
from npeff.tasks.huggingface.pretrained import TextTask, load_model, model_config, tokenizer_of
from npeff.tasks.huggingface.token_table import text_inputs, token_table
from npeff.tasks.huggingface.tokens import pad_token_id, placed_tokens, token_texts, tokenize
from npeff.tasks.prepared import Arrays, Joined, Prepared
from npeff.tasks.tables import texts


class CausalLMTask(TextTask[CausalLMOptions]):
    """``AutoModelForCausalLM`` on a table of texts, with or without prompts. The classes are the vocabulary."""

    Options = CausalLMOptions

    def model(self, cache: Path) -> nn.Module:
        model = load_model(self.options, AutoModelForCausalLM)
        is_skeleton = next(model.parameters()).is_meta
        if not is_skeleton and self.options.attention != "flash_attention_2":  # which needs a GPU
            _check_causal(model, self.options)
        return model

    def read_examples(self, files: Prepared) -> Examples:
        return _Texts(self.options, files)

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

    def __init__(self, options: CausalLMOptions, files: Prepared) -> None:
        rows = options.read(options.texts, files=files)
        parts = [texts(rows, column, options.data) for column in options.texts]
        self._texts, prompts = Joined(parts, ""), None if options.prompt_column is None else parts[0]
        self._tokenizer, self._options = tokenizer_of(options), options
        self._tokens = tokenize(
            files,
            "tokens",
            self._tokenizer,
            pad_token_id(self._tokenizer, model_config(options)),
            options,
            texts(rows, "id", options.data),
            self._texts,
            limits=Limits.of(options, AutoModelForCausalLM),
            note=lambda row, encoding: [_prompt_length(encoding.offsets, 0 if prompts is None else len(prompts[row]))],
        )
        assert self._tokens.notes is not None
        prompt_lengths = self._tokens.notes.joined()
        self._predictions = Predictions.of(_NextTokens(self._tokens.ids, prompt_lengths), options)
        if prompts is not None:
            self._tokens = self._tokens.divided(prompt_lengths)
        used = [*options.texts]
        self._table = files.table("examples", lambda: self._predictions.parts(rows, self._shown, used))

    def __len__(self) -> int:
        return len(self._predictions)

    def lengths(self) -> NDArray[np.integer]:
        if self._predictions.places is None:
            return self._tokens.lengths()
        return self._predictions.places + 1

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

    def prediction_texts(self, predictions: Sequence[tuple[int, int]]) -> list[str | None]:
        found = list[str | None]()
        for index, number in predictions:
            ids = self._tokens.ids[self._predictions.rows[index]]
            found.append(marked(self._tokenizer, ids, self._predictions.position(index, number) + 1)[0])
        return found

    def table(self) -> pa.Table:
        return self._table

    def _shown(self, part: slice) -> dict[str, pa.Array]:
        """Return the columns that are shown of some examples."""
        places = self._predictions.places
        if places is None:
            return {"text": pa.array(self._texts[part], pa.string())}
        numbers = places[part] + 1
        rows = zip(self._predictions.rows[part], numbers.tolist(), strict=True)
        shown = [marked(self._tokenizer, self._tokens.ids[row], number) for row, number in rows]
        text, token = (pa.array([each[which] for each in shown], pa.string()) for which in (0, 1))
        return {"text": text, "position": pa.array(numbers, pa.int64()), "token": token}


class _NextTokens(Sequence[NDArray[np.int64]]):
    """The targets of each row, which follow from its tokens."""

    def __init__(self, ids: Arrays, prompt_lengths: NDArray[np.integer]) -> None:
        self._ids, self._prompt_lengths = ids, prompt_lengths

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, row: Any) -> Any:
        return _next_tokens(self._ids[row], self._prompt_lengths[row])


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
