"""The sections of a run file for the Fisher information of the inputs. ``npeff run`` includes their stages only if the
run file has the section."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, Strict, field_validator, model_validator

from npeff.options.bounds import LARGEST_COUNT
from npeff.runs.config_sections import Count, CountOrZero, Section

_FORM = "give a number of pairs, or a list of pairs of ids of examples, such as [[a, b], [a, c]]"


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


class ScaleConfig(Section):
    pairs: Annotated[tuple[tuple[str, str], ...], Strict(False)] | Count = 64
    """Straight lines between examples: a number of random pairs of different predicted classes, or a list of pairs of
    ids or numbers of examples, such as ``[[a, b], [a, c]]``. With ``along``, the number of random examples."""
    along: Annotated[str | None, Field(min_length=1)] = None
    """A stimulus parameter of the task, along which each example is changed. By default, examples are connected by
    straight lines."""
    points: Annotated[int, Field(ge=2, le=1024)] = 32
    """Number of equal steps at the start. They are halved where it is needed for ``tolerance``."""
    tolerance: PositiveFloat = 0.01
    """Largest relative difference between the length of a path and its lower bound, the sum of chords."""
    space: Literal["model", "input", "gaussian"] = "model"
    """A further prediction of the scale, beside that of the model. ``input``: distance of the inputs. ``gaussian``:
    Fisher information of Gaussian textures with the spectra of the images or, with ``along``, that which the task gives
    for the stimulus. ``model``: none."""
    components: Annotated[tuple[CountOrZero, ...], Strict(False)] = ()
    """Components whose share of paths is computed. Their paths lead from their top examples to examples of other
    predicted classes. They need the stage `lift`."""

    @field_validator("pairs", mode="before")
    @classmethod
    def _check_form(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            if not value or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value):
                raise ValueError(_FORM)
            ids = [[str(each) if type(each) is int else each for each in pair] for pair in value]
            if any(not isinstance(each, str) or not each for pair in ids for each in pair):
                raise ValueError(_FORM)
            return tuple((first, second) for first, second in ids)
        if type(value) is not int:
            raise ValueError(_FORM)
        return value

    @field_validator("components")
    @classmethod
    def _sort_components(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.along is not None and not isinstance(self.pairs, int):
            raise ValueError("along needs a number of examples in pairs: give a number, or remove along")
        if self.along is not None and self.components:
            raise ValueError("components need pairs of examples: remove along, or components")
        same = [first for first, second in self.pairs if first == second] if isinstance(self.pairs, tuple) else []
        if same:
            raise ValueError(f"a pair has the example {same[0]!r} twice: give two different examples")
        return self
