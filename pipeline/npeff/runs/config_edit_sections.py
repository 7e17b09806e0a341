"""The sections of a run file for the stages that edit the model: `repair` and `step`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, Strict

from npeff.runs.config_sections import Count, CountOrZero, Fraction, Section


def _sorted_kls(value: tuple[float, ...]) -> tuple[float, ...]:
    if not value:
        raise ValueError("give at least one mean KL to try, such as [0.1]")
    return tuple(sorted(set(value)))


KlSteps = Annotated[tuple[PositiveFloat, ...], Strict(False), AfterValidator(_sorted_kls)]


class RepairConfig(Section):
    direction: Literal["auto", "own", "lifted"] = "auto"
    """``own``: steps along the components' own directions, which are computed from the stored ones. This needs the
    directions of all components. ``lifted``: steps along the stored directions. ``auto``: ``own`` where it is possible,
    and otherwise ``lifted``."""
    top_examples: Count = 64
    """Number of labelled top examples of each component. Wrong predictions among them are counted and corrected."""
    significance: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    """False discovery rate of the test whether wrong predictions are over-represented in the top examples of a
    component. Only components that pass the test are tried."""
    kl_steps: KlSteps = (0.03, 0.1, 0.3, 1.0)
    """Mean KL divergences in nats on the top examples for which steps of both signs are tried."""
    max_harm: Fraction = 0.01
    """Largest fraction of the right predictions on tuning examples that all edits together may turn into wrong ones."""
    max_edits: Count = 3
    """Largest number of steps along single components. Steps are added as long as they help."""
    joint_passes: CountOrZero = 40
    """Number of gradient evaluations on the tuning examples in the search for joint steps along all lifted components,
    for each of three weights of the right predictions. It follows the steps along single components, and its result is
    used if it corrects more predictions. 0 skips it. It needs a component with over-represented wrong predictions."""


class StepConfig(Section):
    towards: Annotated[str, Field(min_length=1)] | None = None
    """Parquet file of examples and labels, with the columns ``id`` or ``example``, and ``label``. The default are the
    labels of the fitted examples of the run."""
    kind: Literal["diagonal", "kfac", "low_rank", "exact"] = "exact"
    """How the Fisher is inverted. ``exact``: the Fisher itself, by conjugate gradients. ``low_rank``: in the span of a
    few directions. ``kfac``: as a Kronecker product for each layer. ``diagonal``: its diagonal."""
    damping: PositiveFloat = 0.01
    """λ of (F̄ + λI)⁻¹."""
    rank: Count = 16
    """Number of directions of ``low_rank``. A worker holds tensors of so many times the size of the model."""
    tolerance: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
    """Estimated relative error of the direction at which the iterations of ``exact`` end."""
    max_iterations: Count = 100
    """Largest number of iterations of ``exact``. Each takes two passes over the fitted examples."""
    step_size: PositiveFloat | None = None
    """Factor η of the step. By default, the best one of those that reach ``kl_steps`` is chosen."""
    kl_steps: KlSteps = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    """Mean KL divergences in nats on the labelled examples for which steps are tried."""
    max_harm: Fraction = 0.01
    """Largest fraction of the right predictions on labelled examples that the step may turn into wrong ones. It does
    not apply to a given ``step_size``."""
