"""Times of the units of work of the stages after `fishers`, measured on a few examples, and what a run adds them up to.

Steps of the solver and passes of the verification depend on the data. `STEPS` and `PASSES_PER_ROW` are those of the
runs in tests/benchmarks, so that an estimate is right to a factor of two or three.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch

from npeff.directions import accumulate_directions, zero_directions
from npeff.factorization import ExampleShard
from npeff.gradients import GradientCollector, LabelSpec
from npeff.models.loaded import LoadedModel
from npeff.runs.config import RunConfig
from npeff.stages.plan import MATRICES, PASSES_PER_ROW, START_STEPS, STEPS

_SECONDS = 1.0
"""Smallest time in seconds over which a unit is measured, unless it takes longer."""
_MOST_EXAMPLES, _LARGEST_BATCH, _MOST_DIRECTIONS, _MATRIX = 64, 16, 16, 512
_MOST_COORDINATES = 2**14
"""Coordinates of gradient rows with which the solver is measured. Without a sketch, there is one for each parameter."""
_EXACT = 4
"""Factor of the passes with ``verification.exact``."""
_PRODUCT = 0.1
"""Time of a multiplication in a product of matrices, relative to `UnitTimes.eigenvalues`."""


@dataclass(frozen=True)
class UnitTimes:
    """Times in seconds of one worker."""

    prediction: float
    """The logits of one example."""
    collection: float
    """The gradient rows of one example."""
    direction: float
    """Adding one example's rows to the sum of one direction."""
    solver: float
    """One example in a pass of the solver with all components."""
    eigenvalues: float
    """The eigenvalues of a matrix of size 1, with the exponent 3 of the size."""
    tokens: bool
    """Whether the examples have tokens, over which `attribute` divides the evidence."""


def unit_times(
    loaded: LoadedModel, labels: LabelSpec, *, batch_size: int, rank: int, dim: int, components: int, fitting: int
) -> UnitTimes:
    """Measure the units on one worker.

    Args:
        loaded: The model with its examples.
        labels: The labels of the gradient rows.
        batch_size: Number of examples in a batch.
        rank: Rows of an example.
        dim: Dimension of the sketch.
        components: Number of components K.
        fitting: Number of directions whose sums fit the memory of a worker.
    """
    batch_size = min(batch_size, _LARGEST_BATCH)
    chosen = loaded.batches(range(min(batch_size, len(loaded.examples))), batch_size)[0]
    batch, targets = loaded.with_targets(chosen)
    collector = GradientCollector(loaded.model, loaded.logits, loaded.layout, labels, loaded.one)
    most = min(components, fitting, _MOST_DIRECTIONS)
    weights_kBR = torch.ones(most, len(chosen), rank, dtype=torch.float64)

    def lift(directions: int) -> Callable[[], object]:
        sums = zero_directions(loaded.layout, directions, loaded.device)
        weights = weights_kBR[:directions]
        return lambda: accumulate_directions(collector, batch, weights, sums, chosen, targets)

    collection = _seconds(lambda: collector.collect(batch, chosen, targets)) / len(chosen)
    one, several = (_seconds(lift(number)) / len(chosen) for number in (1, most))
    measured = min(dim, _MOST_COORDINATES)
    shard = ExampleShard(torch.randn(_MOST_EXAMPLES, rank, measured, generator=torch.Generator().manual_seed(0)))
    components_KD = torch.nn.functional.normalize(torch.randn(components, measured, dtype=torch.float64), dim=1)
    matrix = torch.randn(_MATRIX, _MATRIX, dtype=torch.float64)
    return UnitTimes(
        prediction=_seconds(lambda: loaded.predict(chosen, batch_size)) / len(chosen),
        collection=collection,
        direction=max(0.0, several - one) / max(1, most - 1),
        solver=_seconds(lambda: shard.accumulate(components_KD)) / _MOST_EXAMPLES * dim / measured,
        eigenvalues=_seconds(lambda: torch.linalg.eigvalsh(matrix @ matrix.T)) / _MATRIX**3,
        tokens=loaded.examples.tokens(chosen[:1]) is not None,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Return the time of one call after a first, which is slower."""
    _finish(work)
    began = time.monotonic()
    for calls in count(1):
        _finish(work)
        if (taken := time.monotonic() - began) > _SECONDS or calls == 10:
            return taken / calls
    raise AssertionError


def _finish(work: Callable[[], object]) -> None:
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def stage_seconds(
    config: RunConfig, units: UnitTimes, *, n_examples: int, rank: int, dim: int, fitting: int
) -> dict[str, float]:
    """Return the estimated times of the stages after `fishers`, of a factorization of low-rank Fishers.

    Args:
        config: The configuration of the run.
        units: Times of the units.
        n_examples: Number of examples N.
        rank: Rows of an example R.
        dim: Dimension of the sketch D.
        fitting: Number of directions whose sums fit the memory of a worker.
    """
    wanted, workers = config.factorization, config.executor.workers
    components, n_fitted = wanted.n_components, round(n_examples * (1 - wanted.held_out_fraction))
    size = min(dim, n_examples * rank)
    products = 2 * n_examples * rank * dim * size * units.eigenvalues * _PRODUCT
    refits = 2 * min(n_fitted, wanted.stability_examples) / 2
    passes = STEPS * n_fitted / workers + START_STEPS * wanted.n_starts * min(n_fitted, wanted.subsample)
    lifted = components if config.lift.components is None else len(config.lift.components)
    blocks = -(-lifted // fitting)
    per_pass = n_fitted * (blocks * units.collection + lifted * units.direction) / workers
    checked = config.verification
    rows = 4 * checked.top_examples + checked.baseline_examples
    through = lifted * rows * PASSES_PER_ROW * (_EXACT if checked.exact else 1)
    shown = min(n_examples, lifted * config.report.top_examples)
    return {
        "spectrum": MATRICES * units.eigenvalues * size**3 + products / workers,
        "factorize": units.solver * (passes + STEPS * refits),
        "lift": per_pass * (1 + 2 * config.lift.polish_steps),
        "verify": through * units.prediction / workers,
        "attribute": shown * units.collection / workers if units.tokens else 0.0,
    }
