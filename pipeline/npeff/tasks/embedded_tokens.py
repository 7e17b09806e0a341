"""The embeddings of tokens as the real-valued inputs of a model.

A forward pass gets the token ids, and its embedding layer returns given values in place of the embeddings. Whatever
else the model derives from the ids, such as positions, the end of a text or a mask, is as before. The logits at the
embeddings of the tokens are therefore exactly those of the tokens, for every model.

Legend: B batch, T tokens, D features of an embedding, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npeff.tasks.base import Inputs
from npeff.tasks.errors import TaskError


@dataclass(frozen=True)
class TokenTable:
    """The layer that embeds the tokens of a model."""

    layer: nn.Module
    """Its output (B, T, D) is the input of the rest of the model."""
    decoder_layer: nn.Module | None = None
    """Layer of a decoder that reads the same tokens, shifted by one position."""

    @torch.no_grad()
    def values(self, tokens: Tensor) -> Tensor:
        """Return the embeddings (..., T, D) of tokens (..., T)."""
        found: Tensor = self.layer(tokens)
        return found.detach()

    def logits(self, tokens_BT: Tensor, logits: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return the logits of a batch with these tokens as a function of their embeddings."""

        def of_values(values_BTD: Tensor) -> Tensor:
            with self.replaced(tokens_BT, values_BTD):
                return logits()

        return of_values

    @contextmanager
    def replaced(self, tokens_BT: Tensor, values_BTD: Tensor) -> Iterator[None]:
        """Replace the embeddings of these tokens by values, in one forward pass of the model.

        Raises:
            TaskError: The model did not embed these tokens in this layer.
        """
        shifted_BT, shifted_BTD = tokens_BT[:, :-1], values_BTD[:, :-1]
        with _first_call(self.layer, tokens_BT, values_BTD) as done:
            decoder = nullcontext() if self.decoder_layer is None else _shifted(self, shifted_BT, shifted_BTD)
            with decoder:
                yield
        _check(done)


def token_inputs(
    table: TokenTable,
    tokens: Tensor,
    present: Tensor,
    segments: Tensor,
    logits: Callable[[Tensor], Tensor],
    texts: Sequence[str] = (),
) -> Inputs:
    """Return the embeddings of the tokens of a batch as inputs.

    Position t of an example is its token t, which lies after the padding where this is on the left: the positions of
    the tokens are those where `Inputs.present` is true.

    Args:
        table: The layer that embeds the tokens.
        tokens: Token ids, int64 (B, ..., T).
        present: False at padding (B, ..., T).
        segments: Number of the text of each token (B, ..., T), -1 at padding and for a special token. A token of a
            text without a name has no group.
        logits: Function of embeddings (B, ..., T, D).
        texts: Names of the texts, which are groups if there are several.
    """
    segments_BP, groups = segments.flatten(1), _distinct(texts) if len(texts) > 1 else ()
    return Inputs(
        values=table.values(tokens),
        logits=logits,
        positions=tuple(range(1, tokens.dim())),
        exchangeable=True,
        mask=segments_BP >= 0,
        present=present.flatten(1),
        groups=groups,
        group_of=segments_BP.where(segments_BP < len(groups), -1) if groups else None,
    )


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, with a number after a name that occurs before, as a column does that is used twice."""
    return tuple(f"{name} ({place + 1})" if name in names[:place] else name for place, name in enumerate(names))


@contextmanager
def _first_call(layer: nn.Module, tokens_BT: Tensor, values_BTD: Tensor) -> Iterator[list[bool]]:
    """Replace the output of the first call with the tokens: a decoder may embed its own tokens in the same layer."""
    done: list[bool] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        placed = None if done else _placed(output, _ids(arguments, keywords), tokens_BT, values_BTD)
        if placed is not None:
            done.append(True)
        return output if placed is None else placed

    with _hooked(layer, hook):
        yield done


@contextmanager
def _shifted(table: TokenTable, tokens_BT: Tensor, values_BTD: Tensor) -> Iterator[None]:
    """Replace the output of the decoder's layer at the positions after the first, which has a token of its own."""
    done: list[bool] = []

    def hook(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        ids = _ids(arguments, keywords)
        if ids is None or ids.dim() != 2 or not torch.equal(ids[:, 1:], tokens_BT):
            return output
        done.append(True)
        return torch.cat([output[:, :1], values_BTD], 1)

    assert table.decoder_layer is not None
    with _hooked(table.decoder_layer, hook):
        yield
    _check(done)


@contextmanager
def _hooked(layer: nn.Module, hook: Any) -> Iterator[None]:
    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _ids(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor | None:
    """Return the token ids of a call of an embedding layer."""
    given = [value for value in (*arguments, *keywords.values()) if isinstance(value, Tensor)]
    return given[0].long() if given else None


def _placed(output: Any, ids: Tensor | None, tokens_BT: Tensor, values_BTD: Tensor) -> Tensor | None:
    """Return the output of a call with the values in place of the embeddings; None if the ids are other tokens."""
    if ids is None or ids.dim() != 2 or not isinstance(output, Tensor):
        return None
    n_tokens = tokens_BT.shape[1]
    if torch.equal(ids, tokens_BT):
        return values_BTD
    if torch.equal(ids.T, tokens_BT):  # XLNet has the positions first
        return values_BTD.transpose(0, 1)
    if torch.equal(ids[:, :n_tokens], tokens_BT):  # Longformer appends padding
        return torch.cat([values_BTD, output[:, n_tokens:]], 1)
    return None


def _check(done: list[bool]) -> None:
    if not done:
        raise TaskError(
            "the model does not embed the tokens of a batch in its input embedding: its embeddings cannot be replaced, "
            "so use another model, or a task of your own with an `inputs` method"
        )
