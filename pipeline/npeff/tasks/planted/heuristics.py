"""Planted heuristics: sentence pairs whose training labels follow two shortcuts, and a small transformer that learns
the shortcuts.

The task provides a ground truth for explanations. Pairs of a premise and a hypothesis are generated from templates with
known true labels (entailment, neutral, contradiction). Two heuristics are planted into the labels of the training set:
for the pairs with the cue of a heuristic whose answer is wrong, a given fraction has the label of the heuristic. The
model learns the true labels and the heuristics, and mostly follows the heuristics if they disagree.

- overlap: every word of the hypothesis is in the premise, so the answer is entailment (the lexical overlap heuristic of
  HANS, McCoy et al. 2019, arXiv 1902.01007). It is wrong, for example, if subject and object are swapped.
- negation: the hypothesis has a negation word, so the answer is contradiction (Gururangan et al. 2018, arXiv
  1803.02324). It is wrong, for example, if the premise is negated too.

No pair has both cues. The examples are pairs that are not in the training set. Their table marks the counter-examples
of a heuristic: the pairs for which its answer is wrong.

Legend: B batch, T tokens, C classes, H heads, w width, d width of a head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional

from npeff.tasks.base import Examples, Inputs, Task, Token, placed_words
from npeff.tasks.embedded_tokens import TokenTable, token_inputs
from npeff.tasks.errors import TaskError
from npeff.tasks.planted.sentence_pairs import (
    ANTONYMS,
    CLASSES,
    KINDS,
    NEGATIONS,
    PLACES,
    VERBS,
    Pair,
    Sentences,
    draw_pairs,
    example_counts,
    planted_labels,
    training_counts,
)
from npeff.tasks.trained_model import train_once, with_weights

_PAD, _CLS, _SEP = "[PAD]", "[CLS]", "[SEP]"
_WORDS = (
    *dict.fromkeys((*KINDS, *KINDS.values())),
    *(word for words in (*VERBS, *ANTONYMS) for word in words),
    *PLACES,
    *NEGATIONS,
    *("the", "is", "near", "in"),
)
_NUMBERS = {word: number for number, word in enumerate((_PAD, _CLS, _SEP, *_WORDS))}
_LONGEST = 2 * 15 + 3
"""Length of two full clauses, [CLS] and two [SEP]."""
_HEADS, _BATCH, _LEARNING_RATE = 4, 64, 3e-3
_MODEL_FILE = "heuristics-model.safetensors"
_ARROW = " → "
"""Separator of premise and hypothesis in the displayed text."""


class _Pairs(Examples):
    class_names = CLASSES

    def __init__(self, pairs: Sequence[Pair], labels: Sequence[int]) -> None:
        self._pairs, self.labels = pairs, labels
        self._tokens = [
            torch.tensor([_NUMBERS[word] for word in (_CLS, *pair.premise, _SEP, *pair.hypothesis, _SEP)])
            for pair in pairs
        ]

    def __len__(self) -> int:
        return len(self._pairs)

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return the numbers of the words (B, T), padded with 0."""
        return nn.utils.rnn.pad_sequence([self._tokens[index] for index in indices], batch_first=True)

    def lengths(self) -> Sequence[int]:
        return [len(tokens_T) for tokens_T in self._tokens]

    def tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        return [_tokens(self._pairs[index]) for index in indices]

    def table(self) -> pa.Table:
        """Return the table of examples.

        ``part`` splits the counter-examples, and the other pairs, of each heuristic into halves: one to repair the
        model, and one to test it.
        """
        pairs, met = self._pairs, Counter[tuple[str, bool]]()
        premises = [" ".join(pair.premise) for pair in pairs]
        hypotheses = [" ".join(pair.hypothesis) for pair in pairs]
        parts = []
        for pair in pairs:
            kind = pair.heuristic, pair.counter_example
            parts.append(("tune", "test")[met[kind] % 2])
            met[kind] += 1
        return pa.table(
            {
                "id": pa.array([f"pair-{number:05d}" for number in range(len(pairs))], pa.string()),
                "label": pa.array(self.labels, pa.int64()),
                "text": pa.array([f"{p}{_ARROW}{h}" for p, h in zip(premises, hypotheses, strict=True)], pa.string()),
                "premise": pa.array(premises, pa.string()),
                "hypothesis": pa.array(hypotheses, pa.string()),
                "template": pa.array([pair.template for pair in pairs], pa.string()),
                "overlap": pa.array([pair.overlap for pair in pairs], pa.float64()),
                "negation": pa.array([pair.negation for pair in pairs], pa.bool_()),
                "heuristic": pa.array([pair.heuristic for pair in pairs], pa.string()),
                "counter_example": pa.array([pair.counter_example for pair in pairs], pa.bool_()),
                "part": pa.array(parts, pa.string()),
            }
        )


def _tokens(pair: Pair) -> list[Token]:
    """Return the tokens with their characters in the displayed text."""
    premise = placed_words(pair.premise)
    ends_at = premise[-1].stop or 0
    hypothesis = placed_words(pair.hypothesis, ends_at + len(_ARROW))
    return [Token(_CLS), *premise, Token(_SEP), *hypothesis, Token(_SEP)]


class _Block(nn.Module):
    """Pre-norm attention and feed-forward layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.feed_in, self.feed_out = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, hidden_BTw: Tensor, live_B11T: Tensor) -> Tensor:
        normed_BTw = self.attention_norm(hidden_BTw)
        query, key, value = (
            project(normed_BTw).unflatten(2, (_HEADS, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed_BHTd = functional.scaled_dot_product_attention(query, key, value, attn_mask=live_B11T)
        hidden_BTw = hidden_BTw + self.output(mixed_BHTd.transpose(1, 2).flatten(2))
        result: Tensor = hidden_BTw + self.feed_out(functional.gelu(self.feed_in(self.feed_norm(hidden_BTw))))
        return result


def _sides(tokens_BT: Tensor) -> Tensor:
    """Return 0 for the tokens up to the first [SEP], and 1 for the others."""
    ends_BT = tokens_BT == _NUMBERS[_SEP]
    return ((ends_BT.cumsum(1) - ends_BT.int()) > 0).long()


class _Network(nn.Module):
    """Transformer from token numbers (B, T) to logits (B, C), which are computed at the first token, [CLS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(_NUMBERS), width, padding_idx=0)
        self.positions = nn.Embedding(_LONGEST, width)
        self.sides = nn.Embedding(2, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, len(CLASSES))

    def forward(self, tokens_BT: Tensor) -> Tensor:
        live_BT = tokens_BT != 0
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        hidden_BTw = self.words(tokens_BT) + self.positions(positions_BT) + self.sides(_sides(tokens_BT))
        for block in self.blocks:
            hidden_BTw = block(hidden_BTw, live_BT[:, None, None])
        result: Tensor = self.classifier(self.norm(hidden_BTw[:, 0]))
        return result


def _train(model: nn.Module, pairs: _Pairs, *, epochs: int, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    n_steps = epochs * -(-len(pairs) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=n_steps, pct_start=0.1)
    labels_N = torch.tensor(pairs.labels)
    for _ in range(epochs):
        for batch in torch.randperm(len(pairs), generator=generator).split(_BATCH):
            loss = functional.cross_entropy(model(pairs.batch(batch.tolist())), labels_N[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


# --- The task ---------------------------------------------------------------------------------------------------------


class PlantedHeuristicsTask(Task):
    """A transformer that is trained on pairs that favour the heuristics. The examples are pairs for which they often
    fail.

    Args:
        seed: Seed of the pairs, the initial weights and the order of training.
        n_train: Number of training pairs. Each heuristic has its cue in a third of them.
        n_examples: Number of examples, which are not training pairs.
        plant_rate: Fraction of the training counter-examples of a heuristic that have the label of the heuristic.
        counter_share: Fraction of the examples that are counter-examples, half of them for each heuristic.
        epochs: Number of passes over the training pairs.
        width: Width of the transformer.
    """

    def __init__(
        self,
        seed: int = 0,
        n_train: int = 6000,
        n_examples: int = 1200,
        plant_rate: float = 0.7,
        counter_share: float = 0.3,
        epochs: int = 15,
        width: int = 48,
    ) -> None:
        for name, number, least, most in (
            ("seed", seed, 0, 2**63 - 1),
            ("n_train", n_train, 30, 100_000),
            ("n_examples", n_examples, 1, 100_000),
            ("epochs", epochs, 1, 1000),
            ("width", width, _HEADS, 1024),
        ):
            if not isinstance(number, int):
                raise TaskError(f"planted-heuristics: {name} must be a whole number, not {number!r}")
            if not least <= number <= most:
                raise TaskError(f"planted-heuristics: {name} must be between {least} and {most}, not {number}")
        for name, share in (("plant_rate", plant_rate), ("counter_share", counter_share)):
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise TaskError(f"planted-heuristics: {name} must be between 0 and 1, not {share!r}")
        if width % _HEADS:
            raise TaskError(f"planted-heuristics: width must be a multiple of {_HEADS}, not {width}")
        random, seen = Random(seed), set[Sentences]()  # noqa: S311  (no secrets)
        self.training_pairs = draw_pairs(training_counts(n_train), random, seen)
        self.training_labels = planted_labels(self.training_pairs, plant_rate, random)
        examples = draw_pairs(example_counts(n_examples, counter_share), random, seen)
        self._examples = _Pairs(examples, [pair.label for pair in examples])
        self._seed, self._epochs, self._width = seed, epochs, width

    def prepare(self, cache: Path) -> None:
        pairs = _Pairs(self.training_pairs, self.training_labels)
        train_once(cache / _MODEL_FILE, lambda: _train(self._network(), pairs, epochs=self._epochs, seed=self._seed))

    def model(self, cache: Path) -> nn.Module:
        return with_weights(self._network(), cache / _MODEL_FILE)

    def examples(self, cache: Path) -> Examples:
        return self._examples

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits_BC: Tensor = model(batch)
        return logits_BC

    def inputs(self, model: nn.Module, batch: Tensor) -> Inputs:
        """Return the embeddings of the words. Premise and hypothesis are groups."""
        table = TokenTable(model.get_submodule("words"))
        special_BT = (batch == _NUMBERS[_PAD]) | (batch == _NUMBERS[_CLS]) | (batch == _NUMBERS[_SEP])
        segments_BT = _sides(batch).masked_fill(special_BT, -1)
        logits = table.logits(batch, lambda: self.logits(model, batch))
        return token_inputs(table, batch, batch != _NUMBERS[_PAD], segments_BT, logits, ("premise", "hypothesis"))

    def _network(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            return _Network(self._width).eval()
