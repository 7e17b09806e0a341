"""The examples on which a component is verified, and the predictions of the model on them.

Legend: N examples, K components, u distinct examples, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from npeff.gradients import UNKNOWN
from npeff.models.loaded import LoadedModel
from npeff.models.predictions import Predictions, joined
from npeff.stages.verify.stored_sketches import StoredSketches
from npeff.statistics.ratio_intervals import Measured
from npeff.store.splits import Splits
from npeff.store.tables import read_table
from npeff.verification import Linearized, Matches, baseline_examples, matched_examples, top_examples

SPLITS = ("fit", "held_out")

Parts = Sequence[NDArray[np.int64]]
"""Disjoint sets of examples, each distinct and ascending."""


@dataclass(frozen=True)
class Groups:
    """The examples on which one component is verified in one split."""

    top: NDArray[np.int64]
    matched: Matches
    by_trace: Matches
    """Matched by the trace alone."""
    random: NDArray[np.int64]

    @property
    def compared(self) -> NDArray[np.int64]:
        """The top examples and their matched baseline, distinct and ascending."""
        return np.union1d(self.top, self.matched.examples_m)

    @cached_property
    def parts(self) -> Parts:
        """All examples, in three disjoint parts: the top examples, their matched baseline, and the others.

        The parts are predicted in separate batches, so that the predictions of a part do not depend on which other
        parts are predicted.
        """
        everything = distinct(self.by_trace.examples_m, self.random)
        return [
            np.sort(self.top),
            np.setdiff1d(self.matched.examples_m, self.top),
            np.setdiff1d(everything, self.compared),
        ]


class Candidates:
    """The examples of a run from which top examples and baseline examples are chosen.

    Args:
        examples: The table of the examples.
        sketches: The stored Fishers.
        scores_NK: The coefficients, or the evidence.
    """

    def __init__(self, examples: Path, sketches: StoredSketches, scores_NK: NDArray[np.float32]) -> None:
        table = read_table(examples, "examples", ["split", "valid", "fisher_norm", "prediction"])
        splits = Splits.of(table)
        self.members = dict(zip(SPLITS, (splits.fit_N, splits.held_out_N), strict=True))
        self.norms_N = table["fisher_norm"].to_numpy()
        self.traces_N = sketches.traces()
        self._classes_N = np.full(len(table), -1, np.int64)
        if sketches.with_logits:  # the classes of a vocabulary are too many to match
            self._classes_N = pc.fill_null(table["prediction"], -1).to_numpy().astype(np.int64)
        self._scores_NK = scores_NK

    def groups(self, component: int, split: str, n_top: int, n_random: int, seed: int) -> Groups:
        """Choose the examples for a component."""
        w_N, members_N = self._scores_NK[:, component], self.members[split]
        top = top_examples(w_N, members_N, n_top)
        unknown_N = np.full_like(self._classes_N, -1)
        matched, by_trace = (
            matched_examples(w_N, self.traces_N, classes_N, members_N, top)
            for classes_N in (self._classes_N, unknown_N)
        )
        return Groups(top, matched, by_trace, baseline_examples(members_N, top, n_random, seed))


@dataclass(frozen=True)
class Answers:
    """The predictions of a model on distinct examples, ascending."""

    examples_u: NDArray[np.int64]
    predictions: Predictions

    def of(self, examples: NDArray[np.int64]) -> Predictions:
        """Return the predictions on some of the examples, in the given order."""
        return self.predictions.at(np.searchsorted(self.examples_u, examples).tolist())

    def and_(self, other: Answers) -> Answers:
        """Return these answers together with those on other examples."""
        examples = np.concatenate([self.examples_u, other.examples_u])
        order = np.argsort(examples, kind="stable")
        return Answers(examples[order], joined([self.predictions, other.predictions]).at(order.tolist()))


@dataclass(frozen=True)
class Effects:
    """One value per distinct example: KL divergences, or other effects of a step."""

    examples_u: NDArray[np.int64]
    values_u: NDArray[np.float64]

    def of(self, examples: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the values of examples; NaN for those without a value."""
        if not len(self.examples_u):
            return np.full(len(examples), np.nan)
        places = np.minimum(np.searchsorted(self.examples_u, examples), len(self.examples_u) - 1)
        return np.where(self.examples_u[places] == examples, self.values_u[places], np.nan)

    def compared(self, top: NDArray[np.int64], baseline: Matches | NDArray[np.int64]) -> Measured:
        """Return the values of the top examples and of a baseline."""
        if isinstance(baseline, Matches):
            return Measured(self.of(top), self.of(baseline.examples_m), baseline.counts_m)
        return Measured(self.of(top), self.of(baseline))


@dataclass(frozen=True)
class Predicted:
    """The effect of a direction on distinct examples, ascending, predicted from the stored sketches."""

    examples_u: NDArray[np.int64]
    effect: Linearized

    def of(self, examples: NDArray[np.int64]) -> Linearized:
        """Return the effect on some of the examples, in the given order."""
        return self.effect.at(np.searchsorted(self.examples_u, examples))

    def kl(self, step: float, examples: NDArray[np.int64]) -> Effects:
        """Predict the KL divergences of a step, with its sign, on some of the examples, distinct and ascending."""
        return Effects(examples, self.of(examples).kl(step))


class Model:
    """The model of a run, which counts the examples that it predicts.

    Args:
        loaded: The model and the examples.
        batch_size: Number of examples in a batch.
        stored: The stored logits replace the predictions of the unmoved model if this is given.
    """

    def __init__(self, loaded: LoadedModel, batch_size: int, stored: StoredSketches | None) -> None:
        self._loaded, self._batch_size, self._stored = loaded, batch_size, stored
        if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in loaded.model.parameters()):
            self._stored = None  # rounding in half precision depends on the batch, and cancels only within a batch
        self.n_passed = 0
        """Number of examples that were passed through the model."""

    def answers(self, parts: Parts, known: Answers | None = None) -> Answers:
        """Compute the predictions of the model as it is now, in addition to those that are ``known``."""
        for part in parts:
            if len(part) or known is None:
                self.n_passed += len(part)
                found = Answers(part, self._loaded.predict(part.tolist(), self._batch_size))
                known = found if known is None else known.and_(found)
        assert known is not None
        return known

    def unmoved_answers(self, parts: Parts) -> Answers:
        """Return the predictions of the unmoved model. The model must not be moved when this is called."""
        if self._stored is None or not self._stored.with_logits:
            return self.answers(parts)
        examples = distinct(*parts)
        logits_uC = torch.from_numpy(self._stored.logits(examples))
        # every comparison takes the classes of the predictions after a step
        return Answers(examples, Predictions(logits_uC[:, None], torch.full((len(examples), 1), UNKNOWN)))


def distinct(*groups: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the distinct examples of all groups, ascending."""
    return np.unique(np.concatenate([np.empty(0, np.int64), *(np.asarray(group, np.int64) for group in groups)]))


def with_classes_of(before: Predictions, after: Predictions) -> Predictions:
    """Return the predictions ``before`` with the classes of ``after``, because stored predictions have none."""
    return replace(before, classes=after.classes)
