"""The section of a run file for the natural-gradient step."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, Strict, field_validator

from npeff.runs.config_sections import Count, Section


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
    kl_steps: Annotated[tuple[PositiveFloat, ...], Strict(False)] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
    """Mean KL divergences in nats on the labelled examples for which steps are tried."""
    max_harm: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    """Largest fraction of the right predictions on labelled examples that the step may turn into wrong ones. It does
    not apply to a given ``step_size``."""

    @field_validator("kl_steps")
    @classmethod
    def _sort_steps(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value:
            raise ValueError("give at least one mean KL to try, such as [0.1]")
        return tuple(sorted(set(value)))
