"""A task whose model has known strategies in known weights: the rules of `compiled_program.py`.

Legend: B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from npeff.tasks.base import Examples, Task, TaskError, Token, placed_words
from npeff.tasks.planted.compiled_program import (
    CLASSES,
    FILLERS,
    FIRST,
    LENGTH,
    RULES,
    START,
    TURN,
    VOCABULARY,
    WordAt,
    compile_rules,
    fired,
    program_logits,
)


def draw_words(wanted: Sequence[bool], decoy_share: float, rng: np.random.Generator) -> list[str]:
    """Return a sequence on which only the given rules fire. Each other rule has a decoy with the given probability."""
    while True:
        words: list[str | None] = [None] * LENGTH
        words[0], words[FIRST.stop] = START, TURN
        for unit in sorted(range(len(RULES)), key=lambda unit: not isinstance(RULES[unit], WordAt)):
            if wanted[unit]:
                RULES[unit].plant(words, rng)
        for unit in rng.permutation(len(RULES)):
            if not wanted[unit] and rng.random() < decoy_share:
                RULES[unit].plant_decoy(words, rng)
        complete = [word or FILLERS[rng.integers(len(FILLERS))] for word in words]
        if fired(complete) == list(wanted):
            return complete


class CompiledRulesTask(Task):
    """Random sequences of words, on which zero, one or two rules fire, and the model that implements the rules.

    The label of an example is its class according to the program. The table has a column ``rule_NAME`` for each rule,
    which is true if the rule fires, and a column ``n_rules`` with the number of firing rules.

    Args:
        seed: Seed of the sequences.
        n_examples: Number of examples N.
        none_share: Probability that no rule fires on a sequence.
        pair_share: Probability that two rules fire. Otherwise, one rule fires. All rules are equally likely.
        decoy_share: Probability of a decoy for a rule that does not fire: words that almost make the rule fire.
        label_noise: Probability that a label is replaced by another class.
        strength: Factor of all logits.
    """

    def __init__(
        self,
        seed: int = 0,
        n_examples: int = 1500,
        none_share: float = 0.15,
        pair_share: float = 0.15,
        decoy_share: float = 0.3,
        label_noise: float = 0.0,
        strength: float = 1.0,
    ) -> None:
        if seed < 0:
            raise TaskError(f"compiled-rules: seed must not be negative, not {seed}")
        if n_examples < 1:
            raise TaskError(f"compiled-rules: n_examples must be at least 1, not {n_examples}")
        shares = {"none_share": none_share, "pair_share": pair_share, "decoy_share": decoy_share}
        for name, share in {**shares, "label_noise": label_noise}.items():
            if not 0 <= share <= 1:
                raise TaskError(f"compiled-rules: {name} must be between 0 and 1, not {share}")
        if none_share + pair_share > 1:
            raise TaskError(f"compiled-rules: none_share and pair_share add up to {none_share + pair_share}, above 1")
        if not 0 < strength <= 10:
            raise TaskError(f"compiled-rules: strength must be above 0 and at most 10, not {strength}")
        self.rules = RULES
        self._strength = strength
        rng = np.random.default_rng(seed)
        words_N = []
        for _ in range(n_examples):
            n_rules = rng.choice(3, p=[none_share, 1 - none_share - pair_share, pair_share])
            chosen = set(rng.choice(len(RULES), n_rules, replace=False))
            words_N.append(draw_words([unit in chosen for unit in range(len(RULES))], decoy_share, rng))
        labels_N = np.array([np.argmax(program_logits(words, strength)) for words in words_N], np.int64)
        others_N = (labels_N + rng.integers(1, len(CLASSES), n_examples)) % len(CLASSES)
        self._examples = _Sequences(words_N, np.where(rng.random(n_examples) < label_noise, others_N, labels_N))

    def rule_masks(self) -> dict[str, dict[str, Tensor]]:
        """Return the entries of the parameters that only one rule uses: rule name to parameter name to mask (bool).

        A mask has the shape of its parameter. No entry belongs to two rules, and the bias of the head to none.
        """
        return compile_rules(self._strength)[1]

    def model(self, cache: Path) -> nn.Module:
        return compile_rules(self._strength)[0]

    def examples(self, cache: Path) -> Examples:
        return self._examples

    def logits(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits: Tensor = model(batch)
        return logits


class _Sequences(Examples):
    class_names = CLASSES

    def __init__(self, words_N: Sequence[Sequence[str]], labels_N: np.ndarray) -> None:
        self._words_N, self._labels_N = words_N, labels_N
        self._tokens_NT = torch.tensor([[VOCABULARY.index(word) for word in words] for words in words_N])

    def __len__(self) -> int:
        return len(self._words_N)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self._tokens_NT[torch.as_tensor(indices, dtype=torch.int64)]

    def tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        return [placed_words(self._words_N[index]) for index in indices]

    def table(self) -> pa.Table:
        fired_NR = np.array([fired(words) for words in self._words_N])
        columns = {
            "id": pa.array([f"sequence-{i:05d}" for i in range(len(self))], pa.string()),
            "label": pa.array(self._labels_N, pa.int64()),
            "text": pa.array([" ".join(words) for words in self._words_N], pa.string()),
        }
        columns |= {f"rule_{rule.name}": pa.array(fired_NR[:, unit]) for unit, rule in enumerate(RULES)}
        return pa.table({**columns, "n_rules": pa.array(fired_NR.sum(1), pa.int64())})
