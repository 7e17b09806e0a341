"""Stage `step`: one natural-gradient step of the model towards labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from npeff.runs.definition import StageDefinition, Summary, UnitProgress
from npeff.stages.fishers import FISHERS

if TYPE_CHECKING:
    from npeff.runs.directory import RunDirectory


def _units(run: RunDirectory) -> UnitProgress:
    return UnitProgress(len(list(run.partial_results("step").glob("trial-*.json"))), None, "step sizes")


def _details(record: Summary) -> str:
    if record["step"] is None:
        return "no step size corrects predictions without harm"
    size, held_out = f"step size {record['step']:.3g}", record["held_out"]
    if held_out is None:
        return size
    changes = f"{held_out['mended']} corrected, {held_out['broken']} broken"
    return f"{size}, held out: {changes} (p = {held_out['p_value']:.2g})"


STEP = StageDefinition(
    name="step",
    help="Take one natural-gradient step of the model towards labels. It is evaluated on held-out examples.",
    function="npeff.stages.step.stage:step",
    after=FISHERS,
    in_run=lambda config: False,
    parts="npeff.stages.step.parts:step_parts",
    units=_units,
    details=_details,
)
