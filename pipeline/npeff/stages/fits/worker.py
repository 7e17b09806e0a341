"""Fits of a search for the number of components: one call each, on a worker that keeps the examples in memory.

Shapes: N examples, R rank, D sketch, K components.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from npeff.factorization import (
    ExampleShard,
    SolverOptions,
    explained,
    solve,
    split_halves,
    starting_components,
    subsample_indices,
)
from npeff.stages.fitted_examples import FittedExamples
from npeff.store.fisher_store import FisherStore

Part = Literal["all", "first", "second"]
PARTS: tuple[Part, ...] = ("all", "first", "second")
"""Of the examples: all, or either half of the split that belongs to the seed."""


@dataclass(frozen=True)
class FitRequest:
    """One fit; its name is that of its files."""

    n_components: int
    seed: int
    part: Part

    @property
    def name(self) -> str:
        return f"{self.n_components:05d}-{self.seed:03d}-{self.part}"


@dataclass(frozen=True)
class FitResult:
    components_KD: NDArray[np.float32]
    explained: float
    """Of the examples that it was fitted on."""
    explained_held_out: float | None
    """Of examples that it was not: the held-out ones, or, where there are none, the other half."""
    n_iter: int
    stopped: str
    seconds: float


class SelectionWorker:
    """Fits components to the same examples, or to halves of them, over and over.

    Args:
        examples: of the run, which are fitted on or held out.
        options: of every fit, but for the number of components and the seed.
        max_examples: more examples than these are replaced by a seeded sample, of the fitted and of the held-out ones.
        seed: of that sample, of the splits, and, with that of a request, of the fit.
        device: to compute on.
    """

    def __init__(
        self, examples: FittedExamples, options: SolverOptions, max_examples: int, seed: int, device: str
    ) -> None:
        store, (splits, weights) = FisherStore.open(examples.fishers), examples.read()
        weights_N = torch.from_numpy(weights)
        self._options, self._seed = options, seed

        def shard(chosen_N: NDArray[np.bool_]) -> ExampleShard:
            rows = np.flatnonzero(chosen_N)
            rows = rows[subsample_indices(len(rows), max_examples, seed)]
            factors_NRD = torch.from_numpy(store.read_rows(rows, ["factors"])["factors"]).to(device)
            return ExampleShard(factors_NRD, weights_N=weights_N[rows])

        self._fit, self._held_out = shard(splits.fit_N), shard(splits.held_out_N)

    def fit(self, request: FitRequest) -> FitResult:
        """Fit the components that are asked for.

        Raises:
            InvalidProblemError: there are too few examples, or nothing but zeros.
        """
        began = time.monotonic()
        shard, judged = self._examples(request)
        options = dataclasses.replace(
            self._options, n_components=request.n_components, seed=_solver_seed(self._seed, request)
        )
        found = solve([shard], starting_components(shard, options), options)
        return FitResult(
            components_KD=found.components_KD.float().cpu().numpy(),
            explained=found.explained,
            explained_held_out=_explained(judged, found.components_KD),
            n_iter=found.n_iter,
            stopped=found.stopped,
            seconds=time.monotonic() - began,
        )

    def _examples(self, request: FitRequest) -> tuple[ExampleShard, ExampleShard]:
        """Those to fit on, and those to be judged on."""
        if request.part == "all":
            return _part(self._fit, slice(None)), self._held_out
        halves = split_halves(self._fit.n_examples, _split_seed(self._seed, request))
        mine, other = halves if request.part == "first" else halves[::-1]
        return _part(self._fit, mine), self._held_out if self._held_out.n_examples else _part(self._fit, other)


def _part(shard: ExampleShard, chosen: slice | NDArray[np.int64]) -> ExampleShard:
    """Some examples of a shard, without its coefficients."""
    places = chosen if isinstance(chosen, slice) else torch.from_numpy(chosen).to(shard.device)
    return ExampleShard(shard.factors_NRD[places], weights_N=shard.weights_N[places])


def _explained(judged: ExampleShard, components_KD: Tensor) -> float | None:
    """With the coefficients that are optimal for these components; None of no examples."""
    if not judged.n_examples:
        return None
    statistics = _part(judged, slice(None)).finish(components_KD)
    if not statistics.fisher_square_sum > 0:
        return None
    return explained(statistics.loss(components_KD), statistics.fisher_square_sum)


def _split_seed(seed: int, request: FitRequest) -> int:
    """Both halves of a seed are of one split, whatever the number of components."""
    return int(np.random.SeedSequence([seed, request.seed]).generate_state(1)[0])


def _solver_seed(seed: int, request: FitRequest) -> int:
    """Another one for each fit: those of two halves have nothing in common but the data."""
    key = [seed, request.seed, request.n_components, PARTS.index(request.part) + 1]
    return int(np.random.SeedSequence(key).generate_state(1)[0])
