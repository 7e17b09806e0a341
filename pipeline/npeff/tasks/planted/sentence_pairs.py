"""Pairs of a premise and a hypothesis from templates with known true labels; see `heuristics.py`.

A premise is random, and an edit of the premise gives the hypothesis. A heuristic is right or wrong on a pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

CLASSES = ("entailment", "neutral", "contradiction")
ENTAILMENT, NEUTRAL, CONTRADICTION = range(3)

KINDS = dict.fromkeys(("dog", "cat", "horse", "goat"), "animal") | dict.fromkeys(
    ("man", "woman", "boy", "girl", "doctor", "farmer"), "person"
)
"""Nouns, each with a more general noun that it entails."""
VERBS = (
    ("chasing", "pursuing", "fleeing"),
    ("helping", "assisting", "hindering"),
    ("praising", "lauding", "blaming"),
    ("pushing", "shoving", "pulling"),
    ("loving", "adoring", "hating"),
    ("lifting", "raising", "lowering"),
)
"""(verb, synonym, antonym of both)"""
ANTONYMS = (("big", "small"), ("old", "young"), ("happy", "sad"), ("loud", "quiet"))
"""Adjectives that exclude each other."""
PLACES = ("park", "garden", "house", "street", "field", "barn")
NEGATIONS = ("not", "never", "no")
MODIFIERS = ("adjective", "object_adjective", "neighbour", "place")


@dataclass(frozen=True)
class Clause:
    """The (adjective) subject (near the neighbour) is (negation) verb the (object_adjective) object (in the place)."""

    subject: str
    verb: str
    object: str
    adjective: str | None = None
    object_adjective: str | None = None
    neighbour: str | None = None
    place: str | None = None
    negation: str | None = None

    def words(self) -> tuple[str, ...]:
        """Return the words. The negation "no" precedes the subject, and the other negations precede the verb."""
        negation = self.negation
        words = ["no" if negation == "no" else "the", self.adjective, self.subject]
        words += ["near", "the", self.neighbour] if self.neighbour else []
        words += ["is", negation if negation != "no" else None, self.verb, "the", self.object_adjective, self.object]
        words += ["in", "the", self.place] if self.place else []
        return tuple(word for word in words if word)


@dataclass(frozen=True)
class Pair:
    """Two sentences, and the true label of the second given the first."""

    premise: tuple[str, ...]
    hypothesis: tuple[str, ...]
    template: str
    label: int

    @property
    def overlap(self) -> float:
        """Fraction of the distinct words of the hypothesis that are in the premise."""
        words = set(self.hypothesis)
        return len(words & set(self.premise)) / len(words)

    @property
    def negation(self) -> bool:
        return not set(NEGATIONS).isdisjoint(self.hypothesis)

    @property
    def heuristic(self) -> str:
        """The heuristics with a cue in this pair: overlap, negation, both or none."""
        return {(1, 0): "overlap", (0, 1): "negation", (1, 1): "both", (0, 0): "none"}[self.overlap == 1, self.negation]

    @property
    def counter_example(self) -> bool:
        """Whether a heuristic with a cue in this pair is wrong."""
        return (self.overlap == 1 and self.label != ENTAILMENT) or (self.negation and self.label != CONTRADICTION)


Edit = Callable[[Clause, Random], Clause]


@dataclass(frozen=True)
class Template:
    """An edit of a premise to a hypothesis, with the true label of the pair."""

    heuristic: str
    """The heuristic with a cue in the pairs. A pair with the cue of another heuristic is drawn again."""
    label: int
    edit: Edit
    needs: str | None = None
    """A modifier that the premise must have."""
    premise_negations: tuple[str | None, ...] = (None,)
    """Possible negations of the premise."""
    shortens: bool = True
    """Whether modifiers other than the subject's adjective may be removed before the edit. A negated premise does not
    allow this."""

    def pair(self, name: str, random: Random) -> Pair:
        """Return a random pair of this template."""
        while True:
            premise = self._premise(random)
            dropped = [m for m in MODIFIERS[1:] if self.shortens and m != self.needs and random.random() < 0.3]
            hypothesis = self.edit(_without(*dropped)(premise, random), random)
            pair = Pair(premise.words(), hypothesis.words(), name, self.label)
            if pair.heuristic == self.heuristic:
                return pair

    def _premise(self, random: Random) -> Clause:
        subject, direct_object, neighbour = random.sample(list(KINDS), 3)
        adjective, object_adjective = (random.choice(pair) for pair in random.sample(ANTONYMS, 2))
        full = Clause(
            subject,
            random.choice(VERBS)[0],
            direct_object,
            adjective,
            object_adjective,
            neighbour,
            random.choice(PLACES),
            random.choice(self.premise_negations),
        )
        absent = [m for m in MODIFIERS if m != self.needs and random.random() < 0.5]
        return _without(*absent)(full, random)


def _without(*modifiers: str) -> Edit:
    absent: dict[str, Any] = dict.fromkeys(modifiers)
    return lambda clause, random: replace(clause, **absent)


def _verb(position: int) -> Edit:
    """Return an edit that replaces the verb by its synonym (1) or antonym (2)."""
    by_verb = {verbs[0]: verbs[position] for verbs in VERBS}
    return lambda clause, random: replace(clause, verb=by_verb[clause.verb])


def _negated(edit: Edit, *negations: str) -> Edit:
    return lambda clause, random: replace(edit(clause, random), negation=random.choice(negations))


def _unchanged(clause: Clause, random: Random) -> Clause:
    return clause


def _weaker_negation(clause: Clause, random: Random) -> Clause:
    """Weaken a negation: "no dog" entails "this dog never" and "this dog not"; "never" entails "not"."""
    return replace(clause, negation="not" if clause.negation == "never" else random.choice(("not", "never")))


def _swapped(clause: Clause, random: Random) -> Clause:
    return replace(clause, subject=clause.object, object=clause.subject)


def _neighbour_acts(clause: Clause, random: Random) -> Clause:
    return replace(clause, subject=clause.neighbour or "", adjective=None, neighbour=None)


def _adjective_moved(clause: Clause, random: Random) -> Clause:
    return replace(clause, adjective=None, object_adjective=clause.adjective)


def _other_object(clause: Clause, random: Random) -> Clause:
    others = [noun for noun in KINDS if noun not in (clause.subject, clause.object)]
    return replace(clause, object=random.choice(others), negation=None)


def _other_place(clause: Clause, random: Random) -> Clause:
    return replace(clause, place=random.choice(PLACES))


def _other_adjective(clause: Clause, random: Random) -> Clause:
    others = [word for pair in ANTONYMS if clause.adjective not in pair for word in pair]
    return replace(clause, adjective=random.choice(others))


def _opposite_adjective(clause: Clause, random: Random) -> Clause:
    opposites = dict(ANTONYMS) | {second: first for first, second in ANTONYMS}
    return replace(clause, adjective=opposites[clause.adjective or ""])


def _more_general(clause: Clause, random: Random) -> Clause:
    if random.random() < 0.5:
        return replace(clause, subject=KINDS[clause.subject])
    return replace(clause, object=KINDS[clause.object])


TEMPLATES = {
    "adjective dropped": Template("overlap", ENTAILMENT, _without("adjective"), "adjective"),
    "neighbour dropped": Template("overlap", ENTAILMENT, _without("neighbour"), "neighbour"),
    "place dropped": Template("overlap", ENTAILMENT, _without("place"), "place"),
    "roles swapped": Template("overlap", NEUTRAL, _swapped),
    "neighbour acts": Template("overlap", NEUTRAL, _neighbour_acts, "neighbour"),
    "adjective moved": Template("overlap", NEUTRAL, _adjective_moved, "adjective"),
    "negated": Template("negation", CONTRADICTION, _negated(_unchanged, *NEGATIONS)),
    "synonym negated": Template("negation", CONTRADICTION, _negated(_verb(1), *NEGATIONS)),
    "negated twice": Template("negation", ENTAILMENT, _weaker_negation, None, ("never", "no"), shortens=False),
    "antonym negated": Template("negation", ENTAILMENT, _negated(_verb(2), "not")),
    "other object negated": Template("negation", NEUTRAL, _negated(_other_object, *NEGATIONS)),
    "swapped roles negated": Template("negation", NEUTRAL, _negated(_swapped, *NEGATIONS)),
    "synonym": Template("none", ENTAILMENT, _verb(1)),
    "more general": Template("none", ENTAILMENT, _more_general),
    "other object": Template("none", NEUTRAL, _other_object, None, (None, *NEGATIONS)),
    "other place": Template("none", NEUTRAL, _other_place),
    "other adjective": Template("none", NEUTRAL, _other_adjective),
    "antonym": Template("none", CONTRADICTION, _verb(2)),
    "opposite adjective": Template("none", CONTRADICTION, _opposite_adjective, "adjective"),
}
"""Templates by name. Premises never contain the synonyms and antonyms of the verbs, nor the general nouns."""
RIGHT = {"overlap": ENTAILMENT, "negation": CONTRADICTION}
"""The answer of each heuristic on a pair with its cue."""


Counts = dict[tuple[str, bool], int]
"""Number of pairs by (heuristic, whether the heuristic is wrong)."""
Sentences = tuple[tuple[str, ...], tuple[str, ...]]
"""Premise and hypothesis of any template."""


def training_counts(n_pairs: int) -> Counts:
    """Return the counts of a training set: each heuristic has a cue in a third, and is right in half of this third."""
    n_cue = n_pairs // 3
    counts = {
        (heuristic, wrong): n_cue // 2 if wrong else n_cue - n_cue // 2
        for heuristic in RIGHT
        for wrong in (False, True)
    }
    return counts | {("none", False): n_pairs - 2 * n_cue}


def planted_labels(pairs: Sequence[Pair], rate: float, random: Random) -> list[int]:
    """Return the true labels of the pairs, with those of a fraction of the counter-examples replaced.

    A fraction ``rate`` of the counter-examples of each heuristic (rounded to whole pairs) gets the heuristic's answer.
    """
    labels = [pair.label for pair in pairs]
    for heuristic, says in RIGHT.items():
        wrong = [place for place, pair in enumerate(pairs) if pair.heuristic == heuristic and pair.counter_example]
        for place in random.sample(wrong, round(rate * len(wrong))):
            labels[place] = says
    return labels


def example_counts(n_pairs: int, counter_share: float) -> Counts:
    """Return the counts of the examples.

    A fraction ``counter_share`` are counter-examples, half of them for each heuristic. The others are a third each.
    """
    n_counter = round(counter_share * n_pairs)
    n_other = n_pairs - n_counter
    return {
        ("overlap", True): n_counter // 2,
        ("negation", True): n_counter - n_counter // 2,
        ("overlap", False): n_other // 3,
        ("negation", False): n_other // 3,
        ("none", False): n_other - 2 * (n_other // 3),
    }


def draw_pairs(counts: Counts, random: Random, seen: set[Sentences]) -> list[Pair]:
    """Draw distinct pairs in random order, which are not in ``seen``, and add them to ``seen``.

    Templates are equally likely.
    """
    drawn: list[Pair] = []
    for (heuristic, wrong), n_pairs in counts.items():
        names = [
            name
            for name, template in TEMPLATES.items()
            if template.heuristic == heuristic and wrong == (template.label != RIGHT.get(heuristic, template.label))
        ]
        goal = len(drawn) + n_pairs
        while len(drawn) < goal:
            name = random.choice(names)
            pair = TEMPLATES[name].pair(name, random)
            if (pair.premise, pair.hypothesis) not in seen:
                seen.add((pair.premise, pair.hypothesis))
                drawn.append(pair)
    random.shuffle(drawn)
    return drawn
