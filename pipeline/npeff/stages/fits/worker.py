"""Single fits of a factorization on a worker, which keeps the examples in memory between the calls.

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
"""Parts of the examples: all, or one of the two halves of the seed's split."""


@dataclass(frozen=True)
class FitRequest:
    """One fit. Its name is also the name of its files."""

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
    """Explained fraction of the fitted examples."""
    explained_held_out: float | None
    """Explained fraction of the held-out examples or, if there are none, of the other half. None without examples."""
    n_iter: int
    stopped: str
    seconds: float


class SelectionWorker:
    """Fits components to a fixed sample of the examples or to halves of the sample.

    Args:
        examples: fitted and held-out examples of the run.
        options: solver options of every fit, except the number of components and the seed.
        max_examples: size of a seeded sample of the fitted examples, and of one of the held-out examples. All examples
            are used if there are fewer.
        seed: seed of the samples and of the splits, and, together with the seed of a request, of the fit.
        device: device to compute on.
        judged: whether the results have an explained fraction of examples that were not fitted.
    """

    def __init__(
        self,
        examples: FittedExamples,
        options: SolverOptions,
        max_examples: int,
        seed: int,
        device: str,
        judged: bool = True,
    ) -> None:
        store, (splits, weights) = FisherStore.open(examples.fishers), examples.read()
        weights_N = torch.from_numpy(weights)
        self._options, self._seed, self._judged = options, seed, judged

        def sample(chosen_N: NDArray[np.bool_]) -> NDArray[np.int64]:
            rows = np.flatnonzero(chosen_N)
            chosen: NDArray[np.int64] = rows[subsample_indices(len(rows), max_examples, seed)]
            return chosen

        # both are in the same shards, and are read together
        parts = sample(splits.fit_N), sample(splits.held_out_N & judged)
        factors_NRD = torch.from_numpy(store.read_rows(np.concatenate(parts), ["factors"])["factors"])
        self._fit, self._held_out = (
            ExampleShard(own_NRD.to(device), weights_N=weights_N[rows])
            for own_NRD, rows in zip(factors_NRD.split([len(rows) for rows in parts]), parts, strict=True)
        )

    def fit(self, request: FitRequest) -> FitResult:
        """Compute the requested fit.

        Raises:
            InvalidProblemError: there are too few examples, or all Fishers are zero.
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
            explained_held_out=_explained(judged, found.components_KD) if self._judged else None,
            n_iter=found.n_iter,
            stopped=found.stopped,
            seconds=time.monotonic() - began,
        )

    def _examples(self, request: FitRequest) -> tuple[ExampleShard, ExampleShard]:
        """Return the examples to fit on and the examples for the evaluation."""
        if request.part == "all":
            return _part(self._fit, slice(None)), self._held_out
        halves = split_halves(self._fit.n_examples, _split_seed(self._seed, request))
        mine, other = halves if request.part == "first" else halves[::-1]
        return _part(self._fit, mine), self._held_out if self._held_out.n_examples else _part(self._fit, other)


def _part(shard: ExampleShard, chosen: slice | NDArray[np.int64]) -> ExampleShard:
    """Return some examples of a shard, without coefficients."""
    places = chosen if isinstance(chosen, slice) else torch.from_numpy(chosen).to(shard.device)
    return ExampleShard(shard.factors_NRD[places], weights_N=shard.weights_N[places])


def _explained(judged: ExampleShard, components_KD: Tensor) -> float | None:
    """Return the explained fraction with the optimal coefficients for these components. None without examples."""
    if not judged.n_examples:
        return None
    statistics = _part(judged, slice(None)).finish(components_KD)
    if not statistics.fisher_square_sum > 0:
        return None
    return explained(statistics.loss(components_KD), statistics.fisher_square_sum)


def _split_seed(seed: int, request: FitRequest) -> int:
    """Return the seed of a split. It does not depend on the part or on the number of components."""
    return int(np.random.SeedSequence([seed, request.seed]).generate_state(1)[0])


def _solver_seed(seed: int, request: FitRequest) -> int:
    """Return a different seed for each fit, so that fits of two halves have nothing in common except the data."""
    key = [seed, request.seed, request.n_components, PARTS.index(request.part) + 1]
    return int(np.random.SeedSequence(key).generate_state(1)[0])
