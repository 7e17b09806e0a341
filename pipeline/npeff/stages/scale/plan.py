"""Which paths are measured: pairs of examples, or examples with a stimulus parameter.

A worker chooses the pairs, because it can tell which inputs a straight line can connect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from npeff.models.loaded import LoadedModel
from npeff.stages.scale.curves import Curves
from npeff.tasks import TaskError

PAIRS_OF_COMPONENT = 12
"""Number of paths of a component, from its first top examples."""

_TRIED = 50
"""Examples that are tried for each random pair that is wanted, and for each top example of a component."""

_CHECKED = 4
"""Examples whose inputs are checked before any path is chosen."""

Ends = tuple[int | None, int, int | None]
"""A component or None, an example, and another one or None."""


@dataclass(frozen=True)
class Request:
    """What is wanted."""

    seed: int
    predictions: Sequence[int | None]
    """The predicted class of each example; None for a sequence."""
    candidates: Sequence[int]
    """Examples to choose from."""
    pairs: Sequence[tuple[int, int]] | int
    """Pairs of examples, or the number of random ones."""
    along: str | None
    """A stimulus parameter."""
    tops: Mapping[int, Sequence[int]]
    """The top examples of each component."""


@dataclass(frozen=True)
class PlannedPath:
    number: int
    component: int | None
    start: int
    end: int | None
    """None for a path along the stimulus parameter."""


@dataclass(frozen=True)
class Block:
    """Paths that a worker measures in one call. They have the same component, or none."""

    number: int
    paths: tuple[PlannedPath, ...]

    def __str__(self) -> str:
        return str(self.number)


def chosen(request: Request, loaded: LoadedModel, curves: Curves) -> list[Ends]:
    """Return the ends of all paths.

    Raises:
        TaskError: A straight line cannot connect the inputs of a pair, or there is no pair that it can connect.
    """
    generator = np.random.default_rng([request.seed, *b"scale"])
    order = generator.permutation(np.array(request.candidates, np.int64)).tolist()
    loaded.check_inputs(order[:_CHECKED])
    if request.along is not None:
        assert isinstance(request.pairs, int)
        curves.check_stimulus(order[0])
        return [(None, example, None) for example in order[: request.pairs]]
    if isinstance(request.pairs, int):
        pairs = list(islice(_random_pairs(order[: _TRIED * request.pairs], request.predictions, curves), request.pairs))
    else:
        pairs = list(request.pairs)
        for pair in pairs:
            curves.check(*pair)
    if not pairs:
        raise TaskError(
            f"task {loaded.spec.task!r}: no two examples of different predicted classes have inputs of the same shape, "
            "and equal further inputs of the model (such as segments), which a straight line needs: give scale.pairs, "
            "or more examples"
        )
    found: list[Ends] = [(None, start, end) for start, end in pairs]
    for component, tops in request.tops.items():
        others = generator.permutation(np.array(request.candidates, np.int64)).tolist()[: _TRIED * len(tops)]
        found += _component_pairs(component, tops, others, request.predictions, curves)
    return found


def _random_pairs(order: Sequence[int], predictions: Sequence[int | None], curves: Curves) -> Iterator[tuple[int, int]]:
    """Yield pairs of different predicted classes that a straight line can connect, each example at most once."""
    waiting: dict[object, list[int]] = {}
    for example in order:
        others = waiting.setdefault(curves.signature(example), [])
        fits = (o for o in others if _differ(predictions[o], predictions[example]) and curves.connects(o, example))
        partner = next(fits, None)
        if partner is None:
            others.append(example)
        else:
            others.remove(partner)
            yield partner, example


def _component_pairs(
    component: int, tops: Sequence[int], others: Sequence[int], predictions: Sequence[int | None], curves: Curves
) -> Iterator[Ends]:
    """Yield a pair for each top example with a partner."""
    used: set[int] = set()
    for top in tops:
        fits = (
            other
            for other in others
            if other not in used
            and other != top
            and _differ(predictions[top], predictions[other])
            and curves.signature(other) == curves.signature(top)
            and curves.connects(top, other)
        )
        if (partner := next(fits, None)) is not None:
            used.add(partner)
            yield component, top, partner


def _differ(first: int | None, second: int | None) -> bool:
    return first is None or first != second
