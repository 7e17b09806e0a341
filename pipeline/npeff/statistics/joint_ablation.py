"""Whether the effect of a component is still there after others are removed: the criterion, and its summary."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npeff.statistics.ratio_intervals import LEAST_KL
from npeff.statistics.verdict import median_of_known, share_of

LEAST_SHARE = 0.5
"""Least KL ratio after a removal, as a fraction of the KL ratio before, of an effect that is still there."""


def still_there(kl_top: float | None, kl_ratio: float | None, unablated: float | None) -> bool | None:
    """Return whether the effect of a step is still there after a removal; None if a ratio is not known.

    Args:
        kl_top: Mean KL divergence of the step on the top examples, after the removal.
        kl_ratio: Matched KL ratio of the step after the removal.
        unablated: Matched KL ratio of the same step without a removal.
    """
    if kl_top is None or kl_ratio is None or unablated is None:
        return None
    return kl_top >= LEAST_KL and kl_ratio > 1 and kl_ratio >= LEAST_SHARE * unablated


@dataclass(frozen=True)
class JointAblation:
    """The removals of one component, from its rows of the table `joint_ablation`."""

    component: int
    kl_ratio_unablated: float | None
    n_draws: int
    """Number of random subsets."""
    share_still_there: float | None
    """Fraction of the random subsets with a known KL ratio after which the effect is still there."""
    median_kl_ratio: float | None
    worst_kl_ratio: float | None
    worst_still_there: bool | None
    """Whether the effect is still there after all of these."""
    adversarial_kl_ratio: float | None
    adversarial_still_there: bool | None
    kl_removed_top: float | None
    """Median over the random subsets of the mean KL divergence of the removal itself on the top examples."""
    kl_removed_matched: float | None
    examples_passed: int
    """Number of examples that were passed through the model."""


def joint_ablations(rows: Iterable[Mapping[str, Any]]) -> list[JointAblation]:
    """Summarize the rows of the table `joint_ablation` by component."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["component"], []).append(row)
    return [_of_component(component, groups[component]) for component in sorted(groups)]


def summary(found: Sequence[JointAblation], counted: Collection[int]) -> dict[str, Any]:
    """Summarize a joint ablation for the record of the stage (JSON).

    Args:
        found: The components.
        counted: The components whose baseline counts as matched. The others are left out.
    """
    known = [each for each in found if each.component in counted and each.share_still_there is not None]
    attacked = [each for each in known if each.adversarial_still_there is not None]
    return {
        "n": len(known),
        "n_left_out": len(found) - len(known),
        "n_draws": max((each.n_draws for each in found), default=0),
        "examples_passed_per_component": round(sum(each.examples_passed for each in found) / max(1, len(found))),
        "median_kl_ratio_unablated": median_of_known(each.kl_ratio_unablated for each in known),
        "median_kl_ratio": median_of_known(each.median_kl_ratio for each in known),
        "median_worst_kl_ratio": median_of_known(each.worst_kl_ratio for each in known),
        "median_adversarial_kl_ratio": median_of_known(each.adversarial_kl_ratio for each in attacked),
        "median_kl_removed_top": median_of_known(each.kl_removed_top for each in known),
        "median_kl_removed_matched": median_of_known(each.kl_removed_matched for each in known),
        "median_share_still_there": median_of_known(each.share_still_there for each in known),
        "share_worst_still_there": share_of([each.worst_still_there is True for each in known]),
        "share_adversarial_still_there": share_of([each.adversarial_still_there is True for each in attacked]),
    }


def _of_component(component: int, rows: Sequence[Mapping[str, Any]]) -> JointAblation:
    drawn = [row for row in rows if not row["adversarial"]]
    known = [row for row in drawn if row["still_there"] is not None]
    attacked = next((row for row in rows if row["adversarial"]), None)
    ratios = [row["kl_ratio_matched"] for row in known]
    return JointAblation(
        component=component,
        kl_ratio_unablated=rows[0]["kl_ratio_unablated"],
        n_draws=len(drawn),
        share_still_there=share_of([row["still_there"] for row in known]),
        median_kl_ratio=median_of_known(ratios),
        worst_kl_ratio=min(ratios, default=None),
        worst_still_there=all(row["still_there"] for row in known) if known else None,
        adversarial_kl_ratio=None if attacked is None else attacked["kl_ratio_matched"],
        adversarial_still_there=None if attacked is None else attacked["still_there"],
        kl_removed_top=median_of_known(row["kl_removed_top"] for row in drawn),
        kl_removed_matched=median_of_known(row["kl_removed_matched"] for row in drawn),
        examples_passed=sum(row["examples_passed"] for row in rows),
    )
