"""Checks of tokenized texts against the tokenizer and the model, before the first batch.

An index beyond a table of a model fails in the middle of the work, and on a GPU it leaves the device unusable. The
sizes of the tables follow from the configuration of the model alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.options import PretrainedOptions
from npeff.tasks.huggingface.pretrained import model_config
from npeff.tasks.prepared import Arrays

_POSITIONS = re.compile(r"pos|wpe")
"""Names of tables of learned or of sinusoidal positions, such as ``position_embeddings``, ``embed_positions``."""


@dataclass(frozen=True)
class Limits:
    """Sizes of the tables of a model. A size is None if the model has no such table, so that there is no limit."""

    positions: int | None = None
    vocabulary: int | None = None
    token_types: int | None = None

    @classmethod
    def of(cls, options: PretrainedOptions, factory: Any, *, target: bool = False) -> Limits:
        """Read the sizes.

        Args:
            options: Options of the model.
            factory: Class with `from_config`, such as AutoModelForCausalLM.
            target: Whether the texts are outputs of a sequence-to-sequence model.
        """
        config = model_config(options)
        try:
            with torch.device("meta"):  # the modules without memory for their parameters
                model = factory.from_config(config, trust_remote_code=options.trust_remote_code)
        except Exception:  # code of a model repository may not support this; the stage tries the longest example
            return cls()
        tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        types = [table.num_embeddings for name, table in tables.items() if "token_type" in name]
        positions = [
            _usable(table)
            for name, table in tables.items()
            if _POSITIONS.search(name.rpartition(".")[2]) and (not config.is_encoder_decoder or _reads(name, target))
        ]
        declared = getattr(config.get_text_config(), "max_position_embeddings", None)
        if positions and isinstance(declared, int):
            positions.append(declared)
        return cls(min(positions, default=None), _vocabulary(model, target), min(types, default=None))

    def check(self, inputs: Mapping[str, Arrays], ids: Sequence[str], options: PretrainedOptions) -> None:
        """Check the tokens of all texts.

        Args:
            inputs: ``input_ids`` and, optionally, ``token_type_ids``, one array for each text.
            ids: Ids of the texts, for error messages.
            options: Options of the model.

        Raises:
            TaskError: A text is longer than the table of positions, or an index is not in its table.
        """
        lengths = inputs["input_ids"].lengths()
        longest = int(lengths.argmax()) if len(lengths) else 0
        if len(lengths) and self.positions is not None and lengths[longest] > self.positions:
            raise TaskError(
                f"{options.data}: row {ids[longest]!r} has {lengths[longest]} tokens, but {options.model!r} has "
                f"{self.positions} positions: set max_length to at most {self.positions}"
            )
        for name, size, kind in (
            ("input_ids", self.vocabulary, "token"),
            ("token_type_ids", self.token_types, "token type"),
        ):
            row = None if size is None or name not in inputs else _first_beyond(inputs[name], size)
            if row is not None:
                raise TaskError(
                    f"{options.data}: row {ids[row]!r} has {kind} {inputs[name][row].max()}, but {options.model!r} has "
                    f"{size} {kind}s: set processor to the tokenizer of the model"
                )


def _first_beyond(arrays: Arrays, size: int) -> int | None:
    """Return the number of the first array with an entry that is not less than ``size``."""
    for start, offsets, values in arrays.chunks():
        if len(beyond := np.flatnonzero(values >= size)):
            return start + int(np.searchsorted(offsets, beyond[0], side="right")) - 1
    return None


def check_vocabulary(tokenizer: Any, options: PretrainedOptions) -> None:
    """Check that the tokenizer has tokens besides the special ones.

    A folder that was written by ``model.save_pretrained`` alone has no tokenizer. For many models, the library then
    returns one that has only special tokens.

    Raises:
        TaskError: The tokenizer has no vocabulary.
    """
    if len(tokenizer) > _MOST_SPECIAL:
        return
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    if len(ordinary) <= 1:  # the mark of the beginning of a word
        source = options.processor or options.model
        raise TaskError(
            f"{source!r} has no tokenizer, or one without a vocabulary: save the tokenizer of the model there "
            "(tokenizer.save_pretrained), or set processor to the folder or hub id of this tokenizer"
        )


_MOST_SPECIAL = 1000
"""Larger vocabularies are not those of a missing tokenizer: it has at most some languages and sentinels."""


def _usable(table: nn.Embedding) -> int:
    """Return the number of positions of a table, whose first entries some models (RoBERTa, BART) do not use."""
    unused = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - int(unused)


def _reads(name: str, target: bool) -> bool:
    """Return whether a table of a sequence-to-sequence model belongs to the decoder (`target`) or to the encoder."""
    return ("decoder" in name.split(".")) == target


def _vocabulary(model: Any, target: bool) -> int | None:
    try:
        table = (model.get_output_embeddings() if target else None) or model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model without a table of tokens (Canine)
        return None
    return None if table is None else int(table.weight.shape[0])
