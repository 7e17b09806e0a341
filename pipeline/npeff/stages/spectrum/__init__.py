"""Stage `spectrum`: the eigenvalues of the mean Fisher, and how many directions hold the information."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npeff.runs.definition import StageDefinition, Summary, UnitProgress
from npeff.stages.fishers import FISHERS

if TYPE_CHECKING:
    from npeff.runs.directory import RunDirectory


def _units(run: RunDirectory) -> UnitProgress | None:
    sums = run.partial_results("spectrum")
    return UnitProgress(len(list(sums.glob("group-*"))), None, "groups of examples") if sums.exists() else None


def headline(record: Summary) -> str:
    """Return a line that summarizes the results, from the record of the stage."""
    if record["not_computed"] is not None:
        return str(record["not_computed"])
    if record["directions_90"] is None:
        return "the Fishers are zero"
    directions = f"{record['directions_90']:,} direction{'s hold' if record['directions_90'] != 1 else ' holds'}"
    return f"{directions} 90% of the information of {record['n_parameters']:,} parameters"


SPECTRUM = StageDefinition(
    name="spectrum",
    help="Compute the eigenvalues of the mean Fisher: how many directions hold the information of the parameters.",
    function="npeff.stages.spectrum.stage:spectrum",
    after=FISHERS,
    units=_units,
    details=headline,
)
