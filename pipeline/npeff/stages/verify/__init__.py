"""Stage `verify`: effects of steps along each direction, compared with controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from npeff.runs.definition import StageDefinition, Summary, units_by_component
from npeff.stages.lift import LIFT


def score_line(score: dict[str, Any]) -> str:
    """Return a line that summarizes the verification for one split, and in records of earlier versions for one sign."""
    examples, sign = score["examples"].replace("_", "-"), score["sign"]
    left_out = score.get("n_not_matched", 0)
    if score["median_kl_ratio"] is None:
        return f"{examples} examples: none of {left_out} components has a matched baseline, so there is no KL ratio"
    direction = "informative sign: median matched" if sign is None else f"{'+' if sign > 0 else '−'} direction: median"
    return (
        f"{examples} examples, {direction} KL ratio {score['median_kl_ratio']:.2f} over {score['n']} components"
        f"{f' ({left_out} not matched)' if left_out else ''}, "
        f"{score['share_above_1']:.0%} above 1, {score['share_above_controls']:.0%} above all controls"
        f" ({score['share_surely_above_controls']:.0%} with 95% confidence)"
    )


def headline(scores: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines that explain the result of the verification, the most important number last.

    Args:
        scores: The summaries in the record of the stage, those of held-out examples first.
    """
    lines = [score_line(score) for score in reversed(scores)]
    first = next(iter(scores), None)
    if first is None or first["sign"] is not None or first["median_kl_ratio"] is None:
        return lines
    if first["failure"] is not None:
        return [*lines, f"warning: the components fail the verification: {first['failure']}"]
    lines.append(
        f"A matched KL ratio of {first['median_kl_ratio']:.2f} means that a step along a component's direction changes "
        f"the predictions on its top examples {first['median_kl_ratio']:.2f} times as much as those on other examples "
        "with the same predicted class and the same trace of the Fisher."
    )
    return lines


def _details(record: Summary) -> str:
    return "; ".join(score_line(score) for score in record["scores"] if score["examples"] == "held_out")


VERIFY = StageDefinition(
    name="verify",
    help="Move the model along each direction and compare the effect with controls.",
    function="npeff.stages.verify.stage:verify",
    after=LIFT,
    added=("prediction_shifts", "example_shifts"),
    optional={"ablation": "verification.ablation"},
    parts="npeff.stages.verify.parts:verify_parts",
    units=lambda run: units_by_component(run, "verify", "components"),
    details=_details,
    settings=lambda config: config.verification.model_dump(mode="json"),
)
