"""Stage `lift`: directions of the components in parameter space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from npeff.options.kinds import is_diagonal
from npeff.runs.definition import StageDefinition, Summary, units_by_component
from npeff.stages.factorize import FACTORIZE

if TYPE_CHECKING:
    from npeff.runs.config import RunConfig


def _details(record: Summary) -> str:
    kind = ""
    if record.get("direction") == "whitened" and record["median_cosine_own"] is not None:
        kind = f", {record['median_cosine_own']:.2f} between whitened and own directions"
    return f"median cosine to the fitted component {record['median_cosine']:.4f}{kind}"


def _settings(config: RunConfig) -> Any:
    """Return the settings of the lift, without those of directions that earlier versions computed.

    Their runs have own directions of Fishers, and whitened directions of diagonals.
    """
    exclude = {"memory_limit_mb", "components"}
    if is_diagonal(config.factorization.kind):
        exclude |= {"damping"} if config.lift.direction == "own" else {"damping", "direction"}
    elif config.lift.direction == "own":
        exclude |= {"damping", "direction"}
    return config.lift.model_dump(mode="json", exclude=exclude)


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
    settings=_settings,
)
