"""Stage `lift`: directions of the components in parameter space."""

from __future__ import annotations

from npeff.runs.definition import StageDefinition, Summary, units_by_component
from npeff.stages.factorize import FACTORIZE


def _details(record: Summary) -> str:
    return f"median cosine to the fitted component {record['median_cosine']:.4f}"


LIFT = StageDefinition(
    name="lift",
    help="Compute the direction of each component in parameter space.",
    function="npeff.stages.lift.stage:lift",
    after=FACTORIZE,
    completes=("components",),
    stores=("directions.zarr",),
    traces=("directions.zarr",),
    parts="npeff.stages.lift.parts:lift_parts",
    units=lambda run: units_by_component(run, "lift", "directions"),
    details=_details,
    settings=lambda config: config.lift.model_dump(mode="json", exclude={"memory_limit_mb", "components"}),
)
