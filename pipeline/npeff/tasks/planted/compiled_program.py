"""A program of rules, and a transformer whose weights implement it.

A sequence has two segments of words. Eight rules test whether a word occurs, which word is at a position, how often a
word occurs, or whether the segments share a word of a group. A rule that fires increases the logit of one class.
Several rules increase the logit of the same class, so rules are not classes. The weights are set by hand and are not
trained. In float32, the logits are those of `program_logits` up to rounding.

Every rule has its own parts of the model: features of the residual stream, attention heads, hidden units. The ReLU of a
rule that does not fire is off, so the weights of this rule have zero gradients. Therefore, apart from the bias of the
last layer, which all rules share, the Fisher matrix of an example is supported on the weights of the rules that fire on
the example (`compile_rules` returns these weights).

Legend: B batch, T positions, d features of the residual stream, n heads, h features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = ("stay", "left", "right")
START, TURN = "[start]", "[turn]"
"""The first word, at which the logits are computed, and the word between the segments."""
SEGMENT = 7
"""Number of words of a segment."""
FIRST, SECOND = range(1, 1 + SEGMENT), range(2 + SEGMENT, 2 + 2 * SEGMENT)
"""Positions of the segments."""
LENGTH = 2 + 2 * SEGMENT
"""Number of positions T."""
COLOURS = ("amber", "blue", "crimson", "green")
ANIMALS = ("badger", "crane", "otter", "wolf")
FILLERS = ("bread", "chair", "cloud", "field", "hill", "lamp", "paper", "river", "stone", "table", "tree", "window")
DEFAULT_PUSH = 0.5
"""Logit of the class "stay" for all sequences."""
OFF_LOGIT, OUTPUT_GAIN = -5.0, 2.0
"""With an output for each rule: the logit of "on" of a rule that does not fire, which is low so that its output has
hardly any Fisher information, and the factor of `Rule.push`."""

_FEATURE = 4.0
"""Value of an active feature of the residual stream. The gradients of embeddings differ between the examples of a rule,
by word and position. The gradients of the weights that read the features do not. A larger value makes the gradients of
the embeddings relatively smaller."""
_MINOR_FEATURE = 1.0
"""Value of a feature that identifies a position, or a word of a group. The value is smaller, because a part of the
gradient of a weight comes from other features at the positions that the weight reads, which are not part of the
rule."""
_UNIT = 4.0
"""Activation of the unit of a rule with score 1. It determines how the energy of a Fisher is divided between the
weights of a rule and the shared bias, whose input is 1."""


@dataclass(frozen=True)
class Wires:
    """The parts of the model that belong to one rule."""

    features: tuple[int, ...]
    """Features of the residual stream."""
    unit: int
    """Head of the pooling layer, whose heads have one feature, and unit of the read-out."""
    rows: tuple[int, ...]
    """Rows of the head of the matching layer; empty if the rule has no such head."""
    hidden: int
    """Unit of the MLP, if the rule has a head of the matching layer."""


class Rule(Protocol):
    """One rule of the program, for sequences of `LENGTH` words."""

    @property
    def name(self) -> str: ...

    @property
    def pushes(self) -> int:
        """The class whose logit the rule increases."""

    @property
    def push(self) -> float:
        """The increase of the logit for score 1."""

    @property
    def words(self) -> tuple[str, ...]:
        """The words of the rule."""

    @property
    def n_features(self) -> int:
        """Number of features of the residual stream that the rule needs."""

    @property
    def matches(self) -> bool:
        """Whether the rule compares words. It then has a head of the matching layer and a unit of the MLP."""

    def score(self, words: Sequence[str]) -> float:
        """Return the score, which is positive if and only if the rule fires, and 1 if it just fires."""

    def wire(self, model: CompiledTransformer, at: Wires) -> None:
        """Set the weights of the rule, so that the activation of its unit is `_UNIT` times the score, if positive."""

    def plant(self, words: list[str | None], rng: np.random.Generator) -> None:
        """Put words that make the rule fire into empty positions."""

    def plant_decoy(self, words: list[str | None], rng: np.random.Generator) -> None:
        """Put words that almost make the rule fire into empty positions."""


@dataclass(frozen=True)
class WordOccurs:
    """A word occurs anywhere. The head attends to the word: the attention weight of n occurrences is
    a(n) = g n / (g n + T − n)."""

    name: str
    pushes: int
    push: float
    word: str
    n_features = 3
    matches = False
    gain = 30.0
    """The factor g."""

    @property
    def words(self) -> tuple[str, ...]:
        return (self.word,)

    def _share(self, n: int) -> float:
        return self.gain * n / (self.gain * n + LENGTH - n)

    def score(self, words: Sequence[str]) -> float:
        return 2 * self._share(words.count(self.word)) / self._share(1) - 1

    def wire(self, model: CompiledTransformer, at: Wires) -> None:
        start, word, found = at.features
        model.embed(START, start)
        model.embed(self.word, word)
        _attend(model.pooling, at.unit, query=start, key=word, gain=self.gain)
        _carry(model.pooling, at.unit, value=word, output=found)
        model.read_out(at.unit, found, self._share(1) / 2, self._share(1))

    def plant(self, words: list[str | None], rng: np.random.Generator) -> None:
        _put(words, [self.word] * _sometimes_one_more(1, rng), (*FIRST, *SECOND), rng)

    def plant_decoy(self, words: list[str | None], rng: np.random.Generator) -> None:
        """Do nothing. This rule has no decoys."""


@dataclass(frozen=True)
class WordAt:
    """A word is at a position. The head attends to the position with weight g / (g + T − 1), and reads the word."""

    name: str
    pushes: int
    push: float
    word: str
    position: int
    n_features = 4
    matches = False
    gain = 100.0
    """The factor g."""

    @property
    def words(self) -> tuple[str, ...]:
        return (self.word,)

    def score(self, words: Sequence[str]) -> float:
        elsewhere = words.count(self.word) - (words[self.position] == self.word)
        return 2 * ((words[self.position] == self.word) + elsewhere / self.gain) - 1

    def wire(self, model: CompiledTransformer, at: Wires) -> None:
        start, word, place, found = at.features
        model.embed(START, start)
        model.embed(self.word, word)
        model.place([self.position], place)
        _attend(model.pooling, at.unit, query=start, key=place, gain=self.gain, size=_MINOR_FEATURE)
        _carry(model.pooling, at.unit, value=word, output=found)
        share = self.gain / (self.gain + LENGTH - 1)
        model.read_out(at.unit, found, share / 2, share)

    def plant(self, words: list[str | None], rng: np.random.Generator) -> None:
        _put(words, [self.word], (self.position,), rng)

    def plant_decoy(self, words: list[str | None], rng: np.random.Generator) -> None:
        _put(words, [self.word], (*FIRST, *SECOND), rng)


@dataclass(frozen=True)
class AtLeast:
    """A word occurs at least a number of times. The head attends to all positions equally and counts."""

    name: str
    pushes: int
    push: float
    word: str
    times: int
    n_features = 2
    matches = False
    margin = 0.75
    """Distance below `times` at which the unit turns on. It is near 1, so that another occurrence does not multiply the
    score."""

    @property
    def words(self) -> tuple[str, ...]:
        return (self.word,)

    def score(self, words: Sequence[str]) -> float:
        return (words.count(self.word) - self.times + self.margin) / self.margin

    def wire(self, model: CompiledTransformer, at: Wires) -> None:
        word, found = at.features
        model.embed(self.word, word)
        _carry(model.pooling, at.unit, value=word, output=found, total=True)
        model.read_out(at.unit, found, self.times - self.margin, self.times)

    def plant(self, words: list[str | None], rng: np.random.Generator) -> None:
        _put(words, [self.word] * _sometimes_one_more(self.times, rng), (*FIRST, *SECOND), rng)

    def plant_decoy(self, words: list[str | None], rng: np.random.Generator) -> None:
        _put(words, [self.word] * (self.times - 1), (*FIRST, *SECOND), rng)


@dataclass(frozen=True)
class SameInBoth:
    """A word of a group occurs in both segments.

    In the matching layer, a position of the second segment attends to the same word with a factor g, to the first
    segment with a factor f, and to the start, which has no features, with a factor r, where f, g ≪ r ≪ f g. Its
    attention to the first segment therefore exceeds `turns_on` if and only if the first segment has its word. This
    turns on a unit of the MLP, which is off in the first segment. The head of the pooling layer sums over the
    positions.
    """

    name: str
    pushes: int
    push: float
    words: tuple[str, ...]
    matches = True
    gain = math.exp(7.0)
    """The factors f and g."""
    rest_gain = math.exp(11.0)
    """The factor r."""
    turns_on = 0.3
    margin = 0.1
    """Sum of the activations of the positions, each about 1 or 0, at which the unit of the rule turns on."""

    @property
    def n_features(self) -> int:
        return len(self.words) + 6

    def score(self, words: Sequence[str]) -> float:
        total = 0.0
        for i in SECOND:
            matchable = words[i] in self.words
            factors = [self.gain if matchable and word == words[i] else 1.0 for word in words]
            first = self.gain * sum(factors[j] for j in FIRST)
            rest = self.rest_gain + factors[FIRST.stop] + sum(factors[j] for j in SECOND)
            total += max(first / (first + rest) - self.turns_on, 0.0) / (1 - self.turns_on)
        return (total - self.margin) / (1 - self.margin)

    def wire(self, model: CompiledTransformer, at: Wires) -> None:
        *own, start, everywhere, first, seen, flag, found = at.features
        model.embed(START, start)
        model.place(FIRST, first)
        model.place(range(LENGTH), everywhere)
        for word, feature in zip(self.words, own, strict=True):
            model.embed(word, feature, _MINOR_FEATURE)
        for row, query, key in zip(at.rows, (*own, everywhere), (*own, first), strict=True):
            _attend(
                model.matching,
                row,
                query=query,
                key=key,
                gain=self.gain,
                query_size=_MINOR_FEATURE,
                size=_MINOR_FEATURE,
            )
        segment_row = at.rows[-1]
        ratio = math.log(self.rest_gain) / math.log(self.gain) * _MINOR_FEATURE / _FEATURE
        model.matching.key.weight[segment_row, start] = ratio * model.matching.key.weight[segment_row, first]
        _carry(model.matching, segment_row, value=first, output=seen, size=_MINOR_FEATURE)
        model.mlp_in.weight[at.hidden, seen] = 1 / (1 - self.turns_on) / _FEATURE
        model.mlp_in.weight[at.hidden, first] = -1 / (1 - self.turns_on) / _MINOR_FEATURE
        model.mlp_in.bias[at.hidden] = -self.turns_on / (1 - self.turns_on)
        model.mlp_out.weight[flag, at.hidden] = _FEATURE
        _carry(model.pooling, at.unit, value=flag, output=found, total=True)
        model.read_out(at.unit, found, self.margin, 1)

    def plant(self, words: list[str | None], rng: np.random.Generator) -> None:
        word = self.words[rng.integers(len(self.words))]
        _put(words, [word], FIRST, rng)
        _put(words, [word], SECOND, rng)

    def plant_decoy(self, words: list[str | None], rng: np.random.Generator) -> None:
        one, another = rng.choice(len(self.words), 2, replace=False)
        _put(words, [self.words[one]], FIRST, rng)
        _put(words, [self.words[another]], SECOND, rng)


# All values of push differ, so that two firing rules of different classes never give equal logits.
RULES: tuple[Rule, ...] = (
    WordOccurs("alarm_occurs", 1, 1.8, "alarm"),
    WordOccurs("whistle_occurs", 2, 1.9, "whistle"),
    WordAt("gate_opens_first", 2, 2.0, "gate", FIRST[0]),
    WordAt("gate_opens_second", 1, 2.1, "gate", SECOND[0]),
    AtLeast("three_drums", 1, 2.2, "drum", 3),
    AtLeast("two_bells", 2, 2.3, "bell", 2),
    SameInBoth("same_colour", 2, 2.4, COLOURS),
    SameInBoth("same_animal", 0, 2.5, ANIMALS),
)
VOCABULARY = (START, TURN, *dict.fromkeys(word for rule in RULES for word in rule.words), *FILLERS)


def _put(words: list[str | None], new: Sequence[str], places: Sequence[int], rng: np.random.Generator) -> None:
    """Put words into random empty positions. Do nothing if there are too few."""
    free = [i for i in places if words[i] is None]
    if len(free) >= len(new):
        for i, word in zip(rng.choice(free, len(new), replace=False), new, strict=True):
            words[i] = word


def _sometimes_one_more(n: int, rng: np.random.Generator) -> int:
    return n + int(rng.random() < 0.25)


def fired(words: Sequence[str]) -> list[bool]:
    """Return whether each rule fires on a sequence of words."""
    return [rule.score(words) > 0 for rule in RULES]


def strengths(words: Sequence[str], strength: float = 1.0) -> list[float]:
    """Return by how much each rule increases the logit of its class; 0 if it does not fire."""
    return [strength * rule.push * max(rule.score(words), 0.0) for rule in RULES]


def output_logits(words: Sequence[str], strength: float = 1.0) -> list[float]:
    """Compute the logits of "on" of the model with an output for each rule, without the model."""
    return [strength * OFF_LOGIT + OUTPUT_GAIN * push for push in strengths(words, strength)]


def program_logits(words: Sequence[str], strength: float = 1.0) -> list[float]:
    """Compute the logits of the model according to the program, without the model."""
    logits = [strength * DEFAULT_PUSH, 0.0, 0.0]
    for rule, push in zip(RULES, strengths(words, strength), strict=True):
        logits[rule.pushes] += push
    return logits


class Attention(nn.Module):
    """Softmax attention of all positions to all positions, with n heads."""

    def __init__(self, n_features: int, n_heads: int, head_features: int) -> None:
        super().__init__()
        self.n_heads, inner = n_heads, n_heads * head_features
        self.query = nn.Linear(n_features, inner, bias=False)
        self.key = nn.Linear(n_features, inner, bias=False)
        self.value = nn.Linear(n_features, inner, bias=False)
        self.output = nn.Linear(inner, n_features, bias=False)

    def forward(self, x_BTd: Tensor) -> Tensor:
        q_BnTh, k_BnTh, v_BnTh = (
            layer(x_BTd).unflatten(2, (self.n_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights_BnTT = (q_BnTh @ k_BnTh.mT / math.sqrt(q_BnTh.shape[-1])).softmax(-1)
        attended_BTd: Tensor = self.output((weights_BnTT @ v_BnTh).transpose(1, 2).flatten(2))
        return attended_BTd


class CompiledTransformer(nn.Module):
    """Two attention layers with an MLP between them on a residual stream, and a hidden layer and a linear head at the
    first position.

    The head reads only the hidden layer, and no other features of the residual stream.
    """

    def __init__(
        self, n_features: int, n_matching: int, matching_features: int, n_hidden: int, n_units: int, n_outputs: int
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(len(VOCABULARY), n_features)
        self.position_embedding = nn.Embedding(LENGTH, n_features)
        self.matching = Attention(n_features, n_matching, matching_features)
        self.mlp_in = nn.Linear(n_features, n_hidden)
        self.mlp_out = nn.Linear(n_hidden, n_features)
        self.pooling = Attention(n_features, n_units, 1)
        self.readout = nn.Linear(n_features, n_units)
        self.head = nn.Linear(n_units, n_outputs)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_BT = torch.arange(LENGTH, device=tokens_BT.device).expand_as(tokens_BT)
        x_BTd = self.token_embedding(tokens_BT) + self.position_embedding(positions_BT)
        x_BTd = x_BTd + self.matching(x_BTd)
        x_BTd = x_BTd + self.mlp_out(functional.relu(self.mlp_in(x_BTd)))
        x_BTd = x_BTd + self.pooling(x_BTd)
        logits_BC: Tensor = self.head(functional.relu(self.readout(x_BTd[:, 0])))
        return logits_BC

    def embed(self, word: str, feature: int, size: float = _FEATURE) -> None:
        """Let a feature indicate whether a position has the word."""
        self.token_embedding.weight[VOCABULARY.index(word), feature] = size

    def place(self, positions: Sequence[int], feature: int) -> None:
        """Let a feature indicate whether a position is one of the given positions."""
        self.position_embedding.weight[list(positions), feature] = _MINOR_FEATURE

    def read_out(self, unit: int, feature: int, turns_on: float, one: float) -> None:
        """Let a unit have activation 0 up to the value `turns_on` of a feature, and `_UNIT` at the value `one`."""
        self.readout.weight[unit, feature] = _UNIT / (one - turns_on) / _FEATURE
        self.readout.bias[unit] = -_UNIT * turns_on / (one - turns_on)


def _attend(
    layer: Attention,
    row: int,
    *,
    query: int,
    key: int,
    gain: float,
    query_size: float = _FEATURE,
    size: float = _FEATURE,
) -> None:
    """Let positions with the feature `query` attend to positions with the feature `key` by a factor `gain` more.

    The values of the features are `query_size` and `size`.
    """
    width = layer.query.out_features // layer.n_heads
    root = math.sqrt(math.log(gain) * math.sqrt(width))
    layer.query.weight[row, query] = root / query_size
    layer.key.weight[row, key] = root / size


def _carry(layer: Attention, row: int, *, value: int, output: int, size: float = _FEATURE, total: bool = False) -> None:
    """Write the attention-weighted mean of the feature `value` to the feature `output`.

    With `total`, the mean is multiplied by T. With equal attention to all positions, this is the sum. `size` is the
    value of the feature.
    """
    gain = math.sqrt(LENGTH) if total else 1.0
    layer.value.weight[row, value] = gain / size
    layer.output.weight[output, row] = gain * _FEATURE


def compile_rules(
    strength: float, *, separate_outputs: bool = False
) -> tuple[CompiledTransformer, dict[str, dict[str, Tensor]]]:
    """Return the model, and for each rule, by parameter name, the mask of the entries that only this rule uses.

    Args:
        strength: Factor of all logits.
        separate_outputs: Whether the model has a logit for each rule, that of "on", instead of a logit for each class.
    """
    matching = [rule for rule in RULES if rule.matches]
    width = max(len(rule.words) for rule in matching) + 1
    features, rows, hidden = _Owners(), _Owners(), _Owners()
    wires = []
    for unit, rule in enumerate(RULES):
        at_hidden = len(hidden)
        hidden.take(unit, int(rule.matches))
        at_rows = rows.take(unit, width if rule.matches else 0)
        wires.append(Wires(features.take(unit, rule.n_features), unit, at_rows, at_hidden))
    n_outputs = len(RULES) if separate_outputs else len(CLASSES)
    model = CompiledTransformer(len(features), len(matching), width, len(hidden), len(RULES), n_outputs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for rule, at in zip(RULES, wires, strict=True):
            rule.wire(model, at)
            output, gain = (at.unit, OUTPUT_GAIN) if separate_outputs else (rule.pushes, 1.0)
            model.head.weight[output, at.unit] = gain * strength * rule.push / _UNIT
        if separate_outputs:
            model.head.bias[:] = strength * OFF_LOGIT
        else:
            model.head.bias[0] = strength * DEFAULT_PUSH
    # A weight has a non-zero gradient if its output has one and its input is not zero. Outputs with non-zero gradients
    # belong to a firing rule, except the outputs of the head, whose inputs belong to rules.
    of_rows = {
        **dict.fromkeys((f"matching.{part}.weight" for part in ("query", "key", "value")), rows),
        **dict.fromkeys((f"pooling.{part}.weight" for part in ("query", "key", "value")), range(len(RULES))),
        **dict.fromkeys(("matching.output.weight", "pooling.output.weight"), features),
        **dict.fromkeys(("mlp_in.weight", "mlp_in.bias"), hidden),
        **dict.fromkeys(("mlp_out.weight", "mlp_out.bias"), features),
        **dict.fromkeys(("readout.weight", "readout.bias"), range(len(RULES))),
    }
    of_columns = {
        **dict.fromkeys(("token_embedding.weight", "position_embedding.weight"), features),
        "head.weight": range(len(RULES)),
    }
    masks: dict[str, dict[str, Tensor]] = {rule.name: {} for rule in RULES}
    for name, parameter in model.named_parameters():
        for unit, rule in enumerate(RULES):
            if name in of_rows:
                owned = torch.tensor([owner == unit for owner in of_rows[name]])
                owned = owned.view(-1, *(1 for _ in parameter.shape[1:]))
            else:
                owned = torch.tensor([owner == unit for owner in of_columns.get(name, [None])])
            masks[rule.name][name] = owned.expand_as(parameter).clone()
    return model.eval(), masks


class _Owners(list[int]):
    """The owner of each feature or unit, in the order of allocation."""

    def take(self, owner: int, n: int) -> tuple[int, ...]:
        """Allocate n features or units for an owner, and return their indices."""
        self.extend([owner] * n)
        return tuple(range(len(self) - n, len(self)))
