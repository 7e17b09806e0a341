"""Multiple choice: selection of one of several continuations of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForMultipleChoice

from npeff.tasks.base import Examples, Inputs, Token
from npeff.tasks.embedded_tokens import token_inputs
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.limits import Limits
from npeff.tasks.huggingface.options import MultipleChoiceOptions
from npeff.tasks.huggingface.pretrained import TextTask, load_model, model_config, tokenizer_of
from npeff.tasks.huggingface.token_table import token_table
from npeff.tasks.huggingface.tokens import pad_token_id, padding_side, placed_tokens, tokenize
from npeff.tasks.labels import distinct_names
from npeff.tasks.prepared import Prepared
from npeff.tasks.tables import example_parts, texts, type_of


class MultipleChoiceTask(TextTask[MultipleChoiceOptions]):
    """``AutoModelForMultipleChoice`` on a table of prompts and choices. The classes are the choices."""

    Options = MultipleChoiceOptions

    def model(self, cache: Path) -> nn.Module:
        padding = pad_token_id(tokenizer_of(self.options), model_config(self.options))
        return load_model(self.options, AutoModelForMultipleChoice, padding)

    def read_examples(self, files: Prepared) -> Examples:
        return _Questions(self.options, files)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        # one choice at a time, so that the first axis of every layer is the examples, which separates their Fishers
        n_choices = batch["input_ids"].shape[1]
        return torch.cat([_choice_logits(model, batch, choice) for choice in range(n_choices)], dim=1)

    def inputs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Inputs:
        """Return the embeddings (B, n, T, D). The prompt and each choice are groups."""
        ids, segments, table = batch["input_ids"], batch["segments"], token_table(model, self.options, decoder=True)
        n_choices, columns = ids.shape[1], self.options.choice_columns
        names = columns if len(columns) > 1 else [f"{columns[0]}[{choice}]" for choice in range(n_choices)]
        own = 1 + torch.arange(n_choices, device=ids.device)[:, None]
        segments = torch.where(segments == 1, own, segments)

        def logits(values: Tensor) -> Tensor:
            found = []
            for choice in range(n_choices):
                with table.replaced(ids[:, choice], values[:, choice]):
                    found.append(_choice_logits(model, batch, choice))
            return torch.cat(found, dim=1)

        texts_of_choices = [self.options.prompt_column, *names]
        return token_inputs(table, ids, batch["attention_mask"] != 0, segments, logits, texts_of_choices)


def _choice_logits(model: nn.Module, batch: Mapping[str, Tensor], choice: int) -> Tensor:
    """Return the logits (B, 1) of one choice."""
    logits: Tensor = model(**{name: value[:, [choice]] for name, value in batch.items() if name != "segments"}).logits
    return logits


class _Questions(Examples):
    """Examples with n choices. Example i has the texts i n … i n + n − 1."""

    def __init__(self, options: MultipleChoiceOptions, files: Prepared) -> None:
        label_column = [options.label_column] if options.label_column else []
        used = [options.prompt_column, *options.choice_columns, *label_column]
        rows = options.read([options.prompt_column, *options.choice_columns], options.label_column, files)
        self._prompts = list(texts(rows, options.prompt_column, options.data))
        self._choices = _choices(rows, options)
        n_choices = len(self._choices[0]) if self._choices else len(options.choice_columns)
        names = options.label_names or (options.choice_columns if len(options.choice_columns) > 1 else range(n_choices))
        self.class_names = distinct_names(names)
        self._table = files.table(
            "examples",
            lambda: example_parts(
                rows, options.labels(rows, options.label_column, self.class_names), self._shown, used
            ),
        )
        config, tokenizer = model_config(options), tokenizer_of(options)
        ids = [example for example in rows["id"].to_pylist() for _ in range(n_choices)]
        prompts = [prompt for prompt in self._prompts for _ in range(n_choices)]
        choices = [choice for row in self._choices for choice in row]
        self._tokens = tokenize(
            files,
            "tokens",
            tokenizer,
            pad_token_id(tokenizer, config),
            options,
            ids,
            prompts,
            choices,
            limits=Limits.of(options, AutoModelForMultipleChoice),
        )
        self._n_choices, self._side = n_choices, padding_side(config)
        self._tokenizer, self._options = tokenizer, options

    def __len__(self) -> int:
        return len(self._table)

    def lengths(self) -> NDArray[np.int32]:
        found: NDArray[np.int32] = self._tokens.lengths().reshape(-1, self._n_choices).max(axis=1)
        return found

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        n = self._n_choices
        rows = [index * n + choice for index in indices for choice in range(n)]
        flat = {**self._tokens.batch(rows, self._side), "segments": self._tokens.segments(rows, self._side)}
        return {name: value.unflatten(0, (len(indices), n)) for name, value in flat.items()}

    def input_tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        """Return the tokens of the texts of all choices, one after another. Each text begins with the prompt."""
        found = []
        for index in indices:
            row: list[Token] = []
            start = len(self._prompts[index])
            for name, choice in zip(self.class_names, self._choices[index], strict=True):
                start += len(f"\n{name}: ")
                parts = self._prompts[index], choice
                row += placed_tokens(self._tokenizer, self._options, *parts, starts=(0, start))
                start += len(choice)
            found.append(row)
        return found

    def table(self) -> pa.Table:
        return self._table

    def _shown(self, part: slice) -> dict[str, pa.Array]:
        """Return the texts of some examples."""
        text = [
            "\n".join([prompt, *(f"{name}: {choice}" for name, choice in zip(self.class_names, choices, strict=True))])
            for prompt, choices in zip(self._prompts[part], self._choices[part], strict=True)
        ]
        return {"text": pa.array(text, pa.string())}


def _choices(rows: pa.Table, options: MultipleChoiceOptions) -> list[list[str]]:
    """Return the texts of the choices of each row. All rows must have the same number."""
    if len(options.choice_columns) > 1:
        columns = [list(texts(rows, name, options.data)) for name in options.choice_columns]
        return [list(row) for row in zip(*columns, strict=True)]
    (name,) = options.choice_columns
    if not (pa.types.is_list(rows[name].type) or pa.types.is_large_list(rows[name].type)):
        raise TaskError(
            f"{options.data}: column {name!r} has type {type_of(rows, name)}, not list: give one column per choice"
        )
    choices: list[list[Any]] = [row or [] for row in rows[name].to_pylist()]
    for example, row in zip(rows["id"].to_pylist(), choices, strict=True):
        if len(row) < 2 or len(row) != len(choices[0]):
            raise TaskError(
                f"{options.data}: row {example!r} has {len(row)} choices, but the first row has {len(choices[0])}: all "
                "rows must have the same number, at least 2, so exclude the others with filter"
            )
    return [["" if choice is None else str(choice) for choice in row] for row in choices]
