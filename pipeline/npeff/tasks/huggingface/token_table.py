"""The layer that embeds the tokens of a pretrained model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from npeff.tasks.base import Inputs
from npeff.tasks.embedded_tokens import TokenTable, token_inputs
from npeff.tasks.errors import TaskError
from npeff.tasks.huggingface.options import PretrainedOptions
from npeff.tasks.huggingface.pretrained import check_single_precision


def token_table(model: Any, options: PretrainedOptions, *, decoder: bool = False) -> TokenTable:
    """Return the layer that embeds the tokens of the texts, that of the encoder if there is one.

    Args:
        model: The model.
        options: Options of the model.
        decoder: Whether the decoder of an encoder-decoder model reads the same tokens, as in classification.

    Raises:
        TaskError: The model has no such layer, or runs in half precision only.
    """
    check_single_precision(options)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # under a PEFT adapter
    two_parts = inner.config.is_encoder_decoder
    layer = _embedding(inner.get_encoder() if two_parts else inner)
    if layer is None:
        raise TaskError(
            f"{options.model!r} has no table of token embeddings, which would be its floating-point inputs: use a "
            "model with one, or a task of your own with an `inputs` method"
        )
    return TokenTable(layer, _embedding(inner.get_decoder()) if two_parts and decoder else None)


def text_inputs(
    table: TokenTable,
    given: Mapping[str, Tensor],
    segments_BT: Tensor,
    logits: Callable[[], Tensor],
    texts: Sequence[str] = (),
) -> Inputs:
    """Return the embeddings of the tokens of texts as inputs.

    Args:
        table: The layer that embeds the tokens.
        given: The inputs of the model, ``input_ids`` and ``attention_mask`` among them.
        segments_BT: Number of the text of each token, as in `Tokens.segments`.
        logits: Function that returns the logits of the batch.
        texts: Names of the texts.
    """
    tokens_BT, present_BT = given["input_ids"], given["attention_mask"] != 0
    return token_inputs(table, tokens_BT, present_BT, segments_BT, table.logits(tokens_BT, logits), texts)


def _embedding(model: Any) -> nn.Module | None:
    try:
        layer: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model without a table of tokens (Canine)
        return None
    return layer
