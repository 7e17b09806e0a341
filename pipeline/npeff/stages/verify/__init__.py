"""Stage `verify`: effects of steps along each direction, compared with controls."""

from __future__ import annotations

from typing import Any

from npeff.runs.definition import StageDefinition, Summary, units_by_component
from npeff.stages.lift import LIFT


def score_line(score: dict[str, Any]) -> str:
    """Return a line that summarizes the verification for one split and one sign."""
    examples, sign = score["examples"].replace("_", "-"), "+" if score["sign"] > 0 else "−"
    return (
        f"{examples} examples, {sign} direction: median KL ratio {score['median_kl_ratio']:.2f} "
        f"over {score['n']} components, "
        f"{score['share_above_1']:.0%} above 1, {score['share_above_controls']:.0%} above all controls"
        f" ({score['share_surely_above_controls']:.0%} with 95% confidence)"
    )


def _details(record: Summary) -> str:
    return "; ".join(score_line(score) for score in record["scores"] if score["examples"] == "held_out")


VERIFY = StageDefinition(
    name="verify",
    help="Move the model along each direction and compare the effect with controls.",
    function="npeff.stages.verify.stage:verify",
    after=LIFT,
    optional={"ablation": "verification.ablation"},
    parts="npeff.stages.verify.parts:verify_parts",
    units=lambda run: units_by_component(run, "verify", "components"),
    details=_details,
    settings=lambda config: config.verification.model_dump(mode="json"),
)
