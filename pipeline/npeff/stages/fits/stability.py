"""How stable the components of a factorization are: do fits of fewer examples, from other seeds, find them again?"""

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


def fitting_worker(run: RunDirectory, max_examples: int, **options: Any) -> WorkerSpec:
    """A worker that fits components to at most `max_examples` of the run's examples.

    Args:
        run: whose examples they are, and whose solver options are used.
        max_examples: of a fit.
        options: of the solver, in the place of the run's.
    """
    return worker_spec(
        run,
        SelectionWorker,
        examples=fitted_examples(run),
        options=run.config.factorization.solver_options(run.config.seed, **options),
        max_examples=max_examples,
        seed=run.config.seed,
        device=device_of(run.config),
    )


def component_stability(
    run: RunDirectory, workers: Executor, components_KD: np.ndarray, progress: ProgressDisplay
) -> np.ndarray | None:
    """Mean |cos| (K,) of each component with its match in a fit of either half of some of the examples.

    The halves are disjoint, and their fits start from seeds of their own: what both find again is in the data. They are
    of at most `factorization.stability_examples` examples together, which bounds their cost, so that rare components
    may seem less stable than they are. None where that is 0, for diagonals, or where a half has fewer rows than there
    are components.
    """
    max_examples = run.config.factorization.stability_examples
    if max_examples == 0 or run.config.factorization.kind != "fishers":
        return None
    worker = fitting_worker(
        run, max_examples, max_iterations=_REFIT_ITERATIONS, tolerance=_REFIT_TOLERANCE, n_starts=_REFIT_STARTS
    )
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
    except InvalidProblemError:  # halves are too small, or zero
        progress.say("stability of the components: not computed, as half of the examples are too few for them")
        return None
    return stability(components_KD, refits)
