"""The embeddings of the tokens of texts as the real-valued inputs of a pretrained model.

Legend: B batch, T tokens, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from npeff.tasks.base import Inputs, TaskError
from npeff.tasks.embedded_tokens import TokenTable
from npeff.tasks.huggingface.pretrained import PretrainedOptions


def token_table(model: Any, options: PretrainedOptions, *, decoder: bool = False) -> TokenTable:
    """Return the layer that embeds the tokens of the texts, of the encoder if there is one.

    Args:
        model: The model.
        options: Options of the model.
        decoder: Whether the decoder of an encoder-decoder model reads the same tokens, as in classification.

    Raises:
        TaskError: The model has no such layer, or runs in half precision only.
    """
    options.check_single_precision()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # under a PEFT adapter
    two_parts = inner.config.is_encoder_decoder
    layer = _embedding(inner.get_encoder() if two_parts else inner)
    if layer is None:
        raise TaskError(
            f"{options.model!r} has no table of token embeddings, which would be its floating-point inputs: use a "
            "model with one, or a task of your own with an `inputs` method"
        )
    return TokenTable(layer, _embedding(inner.get_decoder()) if two_parts and decoder else None)


def token_inputs(
    table: TokenTable,
    inputs: Mapping[str, Tensor],
    segments: Tensor,
    logits: Callable[[Tensor], Tensor],
    texts: Sequence[str],
) -> Inputs:
    """Return the embeddings of the tokens of a batch.

    Position t of an example is its token t. With padding on the left, this token is after the padding: the positions
    of the tokens are those where `Inputs.present` is true.

    Args:
        table: The layer that embeds the tokens.
        inputs: Inputs of the model, ``input_ids`` and ``attention_mask`` (B, ..., T).
        segments: Number of the text of each token (B, ..., T), as in `Tokens`.
        logits: Function of embeddings (B, ..., T, D).
        texts: Names of the texts, which are groups if there are several.
    """
    ids, segments_BP = inputs["input_ids"], segments.flatten(1)
    groups = tuple(texts) if len(texts) > 1 else ()
    return Inputs(
        values=table.values(ids),
        logits=logits,
        positions=tuple(range(1, ids.dim())),
        exchangeable=True,
        mask=segments_BP >= 0,
        present=inputs["attention_mask"].flatten(1) != 0,
        groups=groups,
        group_of=segments_BP.where(segments_BP < len(groups), -1) if groups else None,
    )


def _embedding(model: Any) -> nn.Module | None:
    try:
        layer: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model without a table of tokens (Canine)
        return None
    return layer
