"""Stage `attribute`: the tokens at which a direction acts."""

from __future__ import annotations

from npeff.runs.definition import StageDefinition, units_by_component
from npeff.stages.lift import LIFT

ATTRIBUTE = StageDefinition(
    name="attribute",
    help="Compute at which tokens of its top examples each direction acts, if the task provides tokens.",
    function="npeff.stages.attribute.stage:attribute",
    after=LIFT,
    parts="npeff.stages.attribute.parts:attribute_parts",
    units=lambda run: units_by_component(run, "attribute", "components"),
    details=lambda record: f"{record['n_rows']} shares of the components' top examples",
)
