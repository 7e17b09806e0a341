"""Stage `factorize`: non-negative coefficients and components of the stored Fishers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npeff.runs.definition import StageDefinition, Summary, UnitProgress
from npeff.stages.fishers import FISHERS

if TYPE_CHECKING:
    from npeff.runs.directory import RunDirectory


def _units(run: RunDirectory) -> UnitProgress:
    from npeff.runs.settings import steps_done

    return UnitProgress(steps_done(run), None, "steps")


def _details(record: Summary) -> str:
    explained = f"explained {record['explained']:.4f}, " if "explained" in record else ""
    return f"{explained}{record['stopped']}"


def _stands(run: RunDirectory, record: Summary) -> bool:
    """Return False if the factorization stopped at an iteration limit that has been raised since then, or has lost its
    own table of examples."""
    if "own_examples" in record and not run.own_examples.is_file():
        return False
    return bool(record["stopped"] != "max_iterations" or record["n_iter"] >= run.config.factorization.max_iterations)


FACTORIZE = StageDefinition(
    name="factorize",
    help="Fit non-negative coefficients and components to the Fishers. Resumes from the last checkpoint.",
    function="npeff.stages.factorize.stage:factorize",
    after=FISHERS,
    stores=("factorization.zarr",),
    completed_later={"components": "lift"},
    traces=("checkpoints", "factorization.zarr"),
    parts="npeff.stages.factorize.parts:factorize_parts",
    units=_units,
    details=_details,
    settings=lambda config: config.factorization_signature(),
    recomputed=False,
    stands=_stands,
)
