"""The sections of a run file for the Fisher information of the inputs. ``npeff run`` includes their stages only if the
run file has the section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from npeff.options.bounds import LARGEST_COUNT
from npeff.runs.config_sections import Count, CountOrZero, Section


class FaithfulnessConfig(Section):
    examples: CountOrZero = 0
    """Number of examples on which attributions are compared: held-out examples, if there are as many. 0 skips it."""
    steps: Annotated[int, Field(ge=2, le=LARGEST_COUNT)] = 16
    """Number of steps of the deletion and insertion curves."""


class InputsConfig(Section):
    covariance: Literal["full", "kronecker", "diagonal", "isotropic"] = "full"
    """Covariance of the inputs. ``full``: of all entries of an example, at most 4,096, or of the features of a token.
    ``kronecker``: of the positions, times that of the features. ``diagonal``: the variances. ``isotropic``: the mean
    variance for all entries."""
    scope: Literal["all", "class"] = "all"
    """Examples that the covariance describes: all fitted examples, or those with the same label as the example."""
    spread: PositiveFloat = 0.15
    """The noise around an example is N(0, spread·Σ) for the covariance Σ."""
    samples: Count = 32
    """Number of draws of the noise for each example."""
    label: Literal["prediction", "label", "all"] = "prediction"
    """Class whose probability is explained. ``all``: the sum over all classes, the trace of the Fisher of the inputs,
    with one backward pass for each label row. Examples with several predictions need ``all``."""
    split: Literal["covariance", "conditional"] = "covariance"
    """How the information is split over positions. ``covariance``: (Σg)_p·g_p, which sums to the information and may be
    negative. ``conditional``: g_p·Var(x_p | all others)·g_p, which is not negative."""
    ridge: Annotated[float, Field(ge=0.0, le=1.0)] = 1e-4
    """Fraction of the mean variance that is added to the diagonal of the covariance."""
    examples: Literal["top", "all"] | Count = "top"
    """Examples to explain. ``top``: the top examples that the report shows. A number: so many valid examples, chosen at
    random."""
    faithfulness: FaithfulnessConfig = FaithfulnessConfig()
    """Comparison of attributions by deletion, insertion and information curves."""
