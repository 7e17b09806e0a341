"""A small causal language model, trained on texts that a chain draws, and labels drawn from its predictions.

Legend: N texts, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from npeff.gradients import IGNORED, UNKNOWN, LabelSpec, label_rows
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

WORDS, TOPICS, TOPIC_WORDS, SUCCESSORS = 2000, 16, 200, 4
TRAINED_AT_ONCE = 16
SAMPLED = LabelSpec("sampled", rank=1, seed=0)


class Texts:
    """Each text stays with the words of one topic, of which each has a few that may follow it."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(1)
        words = [torch.randperm(WORDS, generator=self._generator)[:TOPIC_WORDS] for _ in range(TOPICS)]
        self._words = torch.stack(words)
        self._successors = torch.randint(TOPIC_WORDS, (TOPICS, TOPIC_WORDS, SUCCESSORS), generator=self._generator)

    def draw(self, count: int, length: int) -> Tensor:
        """(count, length) int64."""
        topics = torch.randint(TOPICS, (count,), generator=self._generator)
        words = torch.randint(TOPIC_WORDS, (count,), generator=self._generator)
        tokens = []
        for _ in range(length):
            tokens.append(self._words[topics, words])
            choices = torch.randint(SUCCESSORS, (count,), generator=self._generator)
            words = self._successors[topics, words, choices]
        return torch.stack(tokens, 1)


@dataclass(frozen=True)
class Size:
    """Of a model and its texts."""

    width: int
    length: int
    n_texts: int
    steps: int
    """Of training."""
    layers: int = 6
    positions: int | None = None
    """That the model has; as many as a text's tokens unless given."""


def make(folder: Path, size: Size) -> None:
    """Save the trained model to `folder`, and ``data.npz`` beside it: ``input_ids`` and ``labels``, (N, T) int64.

    ``labels[:, t + 1]`` is drawn from the logits at position t; the first is no label.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=size.positions or size.length,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.width // 64,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model, texts = GPT2LMHeadModel(config), Texts()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(size.steps):
        tokens = texts.draw(TRAINED_AT_ONCE, size.length)
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()
    input_ids_NT = texts.draw(size.n_texts, size.length)
    labels_NT = torch.full_like(input_ids_NT, IGNORED)
    for start in range(0, size.n_texts, TRAINED_AT_ONCE):
        numbers = range(start, min(start + TRAINED_AT_ONCE, size.n_texts))
        tokens = input_ids_NT[list(numbers)]
        with torch.no_grad():
            logits = model(tokens).logits
        (direction,) = label_rows(SAMPLED, logits, numbers, targets_of(tokens)).directions
        labels_NT[list(numbers), 1:] = direction[:, :-1].argmax(-1)  # e_ŷ − p is positive at ŷ alone
    model.save_pretrained(folder)
    np.savez(folder / "data.npz", input_ids=input_ids_NT.numpy(), labels=labels_NT.numpy())


def targets_of(input_ids_BT: Tensor) -> Tensor:
    """A prediction at every position but the last, of a class that is to be drawn."""
    targets_BT = torch.full_like(input_ids_BT, UNKNOWN)
    targets_BT[:, -1] = IGNORED
    return targets_BT
