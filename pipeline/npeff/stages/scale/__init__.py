"""Stage `scale`: the perceptual scale of the model, as the length of paths between examples."""

from __future__ import annotations

from npeff.runs.definition import StageDefinition, Summary, UnitProgress, finished
from npeff.stages.factorize import FACTORIZE


def headline(record: Summary) -> str:
    """Return a line that summarizes the results, from the record of the stage."""
    line = f"{record['n_paths']} paths"
    if record["median_length"] is not None:
        line += f", median length {record['median_length']:.3g}"
    if record["median_efficiency"] is not None:
        line += f", median efficiency {record['median_efficiency']:.2f}"
    missed = record["n_tolerance_missed"] - record["n_not_finite"]
    if missed:
        line += f", {missed} not within the tolerance"
    if record["n_not_finite"]:
        line += f", {record['n_not_finite']} without a length, because the information is not finite"
    return line


SCALE = StageDefinition(
    name="scale",
    help="Compute the perceptual scale of the model, as the length of paths between examples, or estimate the scale of "
    "people from answers (--responses).",
    function="npeff.stages.scale.stage:scale",
    after=FACTORIZE,
    in_run=lambda config: config.scale is not None,
    parts="npeff.stages.scale.parts:scale_parts",
    units=lambda run: UnitProgress(len(finished(run.partial_results("scale"))), None, "blocks of paths"),
    details=headline,
)
