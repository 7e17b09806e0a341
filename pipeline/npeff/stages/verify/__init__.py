"""Stage `verify`: effects of steps along each direction, compared with controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from npeff.runs.definition import StageDefinition, Summary, units_by_component
from npeff.stages.lift import LIFT

if TYPE_CHECKING:
    from npeff.runs.config import RunConfig


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


def joint_ablation_line(found: dict[str, Any]) -> str:
    """Return a line that summarizes the joint ablation, from its summary in the record of the stage."""
    if not found["n"]:
        return "joint ablation: no component has a matched baseline and another component to remove"
    adversarial = found["share_adversarial_still_there"]
    return (
        f"{found['examples'].replace('_', '-')} examples, joint ablation: the effect is still there after "
        f"{found['median_share_still_there']:.0%} of {found['n_draws']} random subsets (median over {found['n']} "
        f"components; KL ratio {found['median_kl_ratio_unablated']:.2f} before and {found['median_kl_ratio']:.2f} "
        f"after, KL of the removal itself {found['median_kl_removed_top']:.2g}), for "
        f"{found['share_worst_still_there']:.0%} of the components after all of them"
        + ("" if adversarial is None else f", and for {adversarial:.0%} after an adversarial subset")
    )


def headline(scores: Sequence[dict[str, Any]], joint_ablation: dict[str, Any] | None = None) -> list[str]:
    """Return the lines that explain the result of the verification, the most important number last.

    Args:
        scores: The summaries in the record of the stage, those of held-out examples first.
        joint_ablation: The summary of the joint ablation, if there was one.
    """
    lines = [] if joint_ablation is None else [joint_ablation_line(joint_ablation)]
    lines += [score_line(score) for score in reversed(scores)]
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


_ADDED_KEYS = {"joint_ablation": 0, "by": "coefficient"}


def _settings(config: RunConfig) -> Any:
    """Return the settings of the verification, without the defaults of keys that earlier versions did not have."""
    exclude = {name for name, default in _ADDED_KEYS.items() if getattr(config.verification, name) == default}
    return config.verification.model_dump(mode="json", exclude=exclude)


def _details(record: Summary) -> str:
    return "; ".join(score_line(score) for score in record["scores"] if score["examples"] == "held_out")


VERIFY = StageDefinition(
    name="verify",
    help="Move the model along each direction and compare the effect with controls.",
    function="npeff.stages.verify.stage:verify",
    after=LIFT,
    added=("prediction_shifts", "example_shifts"),
    optional={"ablation": "verification.ablation", "joint_ablation": "verification.joint_ablation"},
    parts="npeff.stages.verify.parts:verify_parts",
    units=lambda run: units_by_component(run, "verify", "components"),
    details=_details,
    settings=_settings,
)
