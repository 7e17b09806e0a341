"""Stability of components: their similarity to components of refits on parts of the examples, with other seeds."""

from __future__ import annotations

from typing import Any

import numpy as np

from npeff.execution.executor import Executor, WorkerSpec
from npeff.factorization import InvalidProblemError, stability
from npeff.runs.directory import RunDirectory
from npeff.runs.progress import ProgressDisplay
from npeff.stages.fits.worker import FitRequest, SelectionWorker
from npeff.stages.worker_specs import device_of, fitted_examples, worker_spec

_REFIT_ITERATIONS = 40
_REFIT_TOLERANCE = 1e-4
_REFIT_STARTS = 2


def fitting_worker(run: RunDirectory, max_examples: int, *, judged: bool, **options: Any) -> WorkerSpec:
    """Return the spec of a worker that fits components to at most ``max_examples`` of the run's examples.

    Args:
        run: the run with the examples and the solver options.
        max_examples: largest number of examples of a fit.
        judged: see `SelectionWorker`.
        options: solver options that override those of the run.
    """
    return worker_spec(
        run,
        SelectionWorker,
        examples=fitted_examples(run),
        options=run.config.factorization.solver_options(run.config.seed, **options),
        max_examples=max_examples,
        judged=judged,
        seed=run.config.seed,
        device=device_of(run.config),
    )


def component_stability(
    run: RunDirectory, workers: Executor, components_KD: np.ndarray, progress: ProgressDisplay
) -> np.ndarray | None:
    """Return the mean |cos| (K,) of each component with its best match in two refits, each on one half of the examples.

    The halves are disjoint and the refits use different seeds, so a component that both refits recover is a property
    of the data. The halves have at most `factorization.stability_examples` examples together, which bounds the cost;
    rare components may therefore appear less stable than they are.

    Returns None if `factorization.stability_examples` is 0, for diagonal Fishers, or if a half has fewer rows than
    there are components.
    """
    max_examples = run.config.factorization.stability_examples
    if max_examples == 0 or run.config.factorization.kind != "fishers":
        return None
    options = {"max_iterations": _REFIT_ITERATIONS, "tolerance": _REFIT_TOLERANCE, "n_starts": _REFIT_STARTS}
    worker = fitting_worker(run, max_examples, judged=False, **options)
    halves = [
        FitRequest(len(components_KD), seed=0, part="first"),
        FitRequest(len(components_KD), seed=0, part="second"),
    ]
    refits = []
    try:
        with progress.stage("stability", len(halves), "refits") as tick:
            for _, result in workers.map(worker, "fit", halves):
                refits.append(result.components_KD)
                tick(len(refits))
    except InvalidProblemError:  # a half is too small, or all its Fishers are zero
        progress.say("stability of the components: not computed, because half of the examples are too few")
        return None
    return stability(components_KD, refits)
