"""A task whose model has known strategies in known weights: the rules of `compiled_program.py`.

Legend: B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from npeff.tasks.base import Examples, Inputs, Task, Token, placed_words
from npeff.tasks.embedded_tokens import TokenTable, token_inputs
from npeff.tasks.errors import TaskError
from npeff.tasks.planted.active_rules import check_active, draw_count
from npeff.tasks.planted.compiled_program import (
    CLASSES,
    FILLERS,
    FIRST,
    LENGTH,
    RULES,
    SECOND,
    START,
    TURN,
    VOCABULARY,
    WordAt,
    compile_rules,
    fired,
    program_logits,
    strengths,
)

_MOST_ACTIVE = 4
"""Number of rules whose words always fit into a sequence."""


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
    """Random sequences of words, on which some rules fire, and the model that implements the rules.

    The label of an example is its class according to the program. The table has a column ``rule_NAME`` for each rule,
    which is true if the rule fires, a column ``strength_NAME`` with the increase of a logit by the rule, and a column
    ``n_rules`` with the number of firing rules.

    Args:
        seed: Seed of the sequences.
        n_examples: Number of examples N.
        none_share: Probability that no rule fires on a sequence.
        pair_share: Probability that two rules fire. Otherwise, one rule fires. All rules are equally likely.
        decoy_share: Probability of a decoy for a rule that does not fire: words that almost make the rule fire.
        label_noise: Probability that a label is replaced by another class.
        strength: Factor of all logits.
        n_active: Number of rules that fire on each example, instead of `none_share` and `pair_share`.
        at_most: With `n_active`: draw the number of rules that fire uniformly from 1 to `n_active`.
        separate_outputs: Whether each rule has an output with the classes "off" and "on", instead of one output with
            three classes to which all rules contribute. The gradients of rules that fire together then do not add up
            in one row: the Fisher of an example is the sum of the Fishers of its rules. The examples have several
            predictions and no label, so that the run needs ``fishers.labels: sampled``.
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
        n_active: int | None = None,
        at_most: bool = False,
        separate_outputs: bool = False,
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
        if n_active is not None:
            check_active("compiled-rules", n_active, _MOST_ACTIVE)
            if (none_share, pair_share) != (0.15, 0.15):
                raise TaskError("compiled-rules: n_active replaces none_share and pair_share: give one or the other")
        elif at_most:
            raise TaskError("compiled-rules: at_most needs n_active: give the largest number of active rules")
        if separate_outputs and label_noise:
            raise TaskError("compiled-rules: label_noise needs labels, which separate_outputs has not: leave one out")
        self.rules = RULES
        self._strength, self._separate_outputs = strength, separate_outputs
        rng = np.random.default_rng(seed)
        words_N = []
        for _ in range(n_examples):
            if n_active is None:
                n_rules = rng.choice(3, p=[none_share, 1 - none_share - pair_share, pair_share])
            else:
                n_rules = draw_count(n_active, at_most, rng)
            chosen = set(rng.choice(len(RULES), n_rules, replace=False))
            words_N.append(draw_words([unit in chosen for unit in range(len(RULES))], decoy_share, rng))
        labels_N = np.array([np.argmax(program_logits(words, strength)) for words in words_N], np.int64)
        others_N = (labels_N + rng.integers(1, len(CLASSES), n_examples)) % len(CLASSES)
        labels_N = np.where(rng.random(n_examples) < label_noise, others_N, labels_N)
        self._examples = _Sequences(words_N, None if separate_outputs else labels_N, strength)

    def rule_masks(self) -> dict[str, dict[str, Tensor]]:
        """Return the entries of the parameters that only one rule uses: rule name to parameter name to mask (bool).

        A mask has the shape of its parameter. No entry belongs to two rules, and the bias of the head to none.
        """
        return compile_rules(self._strength, separate_outputs=self._separate_outputs)[1]

    def model(self, cache: Path) -> nn.Module:
        return compile_rules(self._strength, separate_outputs=self._separate_outputs)[0]

    def examples(self, cache: Path) -> Examples:
        return self._examples

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        if not self._separate_outputs:
            logits_BC: Tensor = model(batch)
            return logits_BC
        on_BT = model(batch["tokens"])
        return torch.stack([torch.zeros_like(on_BT), on_BT], dim=2)

    def inputs(self, model: nn.Module, batch: Any) -> Inputs:
        """Return the embeddings of the words. The segments are groups."""
        tokens_BT = batch["tokens"] if self._separate_outputs else batch
        table = TokenTable(model.get_submodule("token_embedding"))
        segments_T = torch.full((LENGTH,), -1, device=tokens_BT.device)
        segments_T[list(FIRST)], segments_T[list(SECOND)] = 0, 1
        segments_BT = segments_T.expand_as(tokens_BT)
        logits = table.logits(tokens_BT, lambda: self.logits(model, batch))
        names = "first segment", "second segment"
        return token_inputs(table, tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool), segments_BT, logits, names)

    def targets(self, batch: Any) -> Tensor | None:
        return batch["fired"] if self._separate_outputs else None


class _Sequences(Examples):
    def __init__(self, words_N: Sequence[Sequence[str]], labels_N: np.ndarray | None, strength: float) -> None:
        """`labels_N` is None if each rule has an output."""
        self.class_names = ("off", "on") if labels_N is None else CLASSES
        self._words_N, self._labels_N, self._strength = words_N, labels_N, strength
        self._tokens_NT = torch.tensor([[VOCABULARY.index(word) for word in words] for words in words_N])

    def __len__(self) -> int:
        return len(self._words_N)

    def batch(self, indices: Sequence[int]) -> Tensor | dict[str, Tensor]:
        tokens_BT = self._tokens_NT[torch.as_tensor(indices, dtype=torch.int64)]
        if self._labels_N is not None:
            return tokens_BT
        fired_BR = torch.tensor([fired(self._words_N[index]) for index in indices])
        return {"tokens": tokens_BT, "fired": fired_BR.long()}

    def tokens(self, indices: Sequence[int]) -> list[list[Token]]:
        return [placed_words(self._words_N[index]) for index in indices]

    def table(self) -> pa.Table:
        fired_NR = np.array([fired(words) for words in self._words_N])
        strengths_NR = np.array([strengths(words, self._strength) for words in self._words_N])
        no_labels = self._labels_N is None
        columns = {
            "id": pa.array([f"sequence-{i:05d}" for i in range(len(self))], pa.string()),
            "label": pa.nulls(len(self), pa.int64()) if no_labels else pa.array(self._labels_N, pa.int64()),
            "text": pa.array([" ".join(words) for words in self._words_N], pa.string()),
        }
        columns |= {f"rule_{rule.name}": pa.array(fired_NR[:, unit]) for unit, rule in enumerate(RULES)}
        columns |= {f"strength_{rule.name}": pa.array(strengths_NR[:, unit]) for unit, rule in enumerate(RULES)}
        return pa.table({**columns, "n_rules": pa.array(fired_NR.sum(1), pa.int64())})
