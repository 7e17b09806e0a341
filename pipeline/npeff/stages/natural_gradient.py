"""Natural gradients with the Fisher of a run."""

from __future__ import annotations

from npeff.execution.executor import Executor
from npeff.execution.serial import SerialExecutor
from npeff.runs.errors import RunDirectoryError
from npeff.runs.opening import AnyRun, as_run
from npeff.runs.progress import Progress, display
from npeff.runs.stage import record_of
from npeff.stages.ewc import stored_diagonal
from npeff.stages.fishers import FISHERS
from npeff.stages.step.fisher_rows import KINDS, Kind, RunRows, preconditioner
from npeff.store.tables import read_table
from npeff.training import DiagonalPreconditioner, Preconditioner
from npeff.training.checks import checked_damping
from npeff.training.ewc import refuse_empirical


def natural_gradient(
    run: AnyRun,
    *,
    kind: Kind = "exact",
    damping: float,
    rank: int = 16,
    tolerance: float = 0.01,
    max_iterations: int = 100,
    allow_empirical: bool = False,
    executor: Executor | None = None,
    progress: Progress = "auto",
) -> Preconditioner:
    """Make the natural gradient (F̄ + λI)⁻¹ g of a run, with the mean Fisher F̄ of its valid examples.

    F̄ is that of the parameters and of the model of the run. All kinds but ``diagonal`` compute gradient rows with the
    model that the task of the run loads.

    Args:
        run: The run, with Fishers.
        kind: ``diagonal`` reads the stored mean diagonal (``fishers.diagonal.mean: true``). ``kfac`` computes Kronecker
            factors in one pass over the examples, and ``low_rank`` the leading directions in two. ``exact`` takes two
            passes in each iteration of `precondition`.
        damping: λ, above 0.
        rank: Number of directions of ``low_rank``.
        tolerance: Estimated relative error of the direction at which the iterations of ``exact`` end.
        max_iterations: Largest number of iterations of ``exact``.
        allow_empirical: Accept Fishers that were computed with the labels of the data.
        executor: Executor for the passes. They run in this process if None.
        progress: Display for the progress of each pass; see `npeff.runs.progress.display`.

    Returns:
        The natural gradient, with the method ``precondition(gradients)``.

    Raises:
        NpeffError: The run has no Fishers or no diagonal, its model is no longer the one of its Fishers, or an option
            is out of bounds. The message is one line with the cause and the remedy.
    """
    opened = as_run(run, of_all=True)
    if kind not in KINDS:
        raise RunDirectoryError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    damping = checked_damping(damping)
    record_of(opened, FISHERS)
    refuse_empirical(opened.config.fishers.labels, str(opened.path), allow_empirical)
    if kind == "diagonal":
        return DiagonalPreconditioner(stored_diagonal(opened)[0], damping=damping)
    valid_N = read_table(opened.table("examples"), "examples", ["valid"])["valid"].to_numpy()
    if not valid_N.any():
        raise RunDirectoryError(f"no example of {opened.path} has finite logits and gradients: check the examples")
    rows = RunRows(opened, executor or SerialExecutor(), valid_N, display(progress))
    return preconditioner(rows, kind, damping, rank, tolerance, max_iterations)
