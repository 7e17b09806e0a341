"""Stage `select`: how many components the Fishers support."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npeff.runs.definition import StageDefinition, UnitProgress
from npeff.stages.fishers import FISHERS

if TYPE_CHECKING:
    from npeff.runs.directory import RunDirectory


def _units(run: RunDirectory) -> UnitProgress:
    return UnitProgress(len(list(run.partial_results("select").glob("*.json"))), None, "fits")


SELECT = StageDefinition(
    name="select",
    help="Recommend a number of components. Fits several numbers, with several seeds and on halves of the examples.",
    function="npeff.stages.select.stage:select",
    after=FISHERS,
    in_run=lambda config: False,
    parts="npeff.stages.select.parts:select_parts",
    units=_units,
    details=lambda record: f"recommends {record['n_components']} components",
)
