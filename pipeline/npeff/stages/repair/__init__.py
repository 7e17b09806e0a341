"""Stage `repair`: edits of the model along components that represent mistakes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npeff.runs.definition import StageDefinition, Summary, UnitProgress
from npeff.stages.lift import LIFT

if TYPE_CHECKING:
    from npeff.runs.directory import RunDirectory


def _units(run: RunDirectory) -> UnitProgress:
    return UnitProgress(len(list(run.partial_results("repair").glob("*.json"))), None, "attempts")


def _details(record: Summary) -> str:
    held_out = record["held_out"]
    edits = f"{len(record['edits'])} edits"
    if held_out is None:
        return edits
    changes = f"{held_out['mended']} corrected, {held_out['broken']} broken"
    return f"{edits}, held out: {changes} (p = {held_out['p_value']:.2g})"


REPAIR = StageDefinition(
    name="repair",
    help="Correct wrong predictions by steps along components. The result is evaluated on held-out examples.",
    function="npeff.stages.repair.stage:repair",
    after=LIFT,
    in_run=lambda config: False,
    parts="npeff.stages.repair.parts:repair_parts",
    units=_units,
    details=_details,
)
